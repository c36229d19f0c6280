"""Mamba-2's state-space duality (arXiv 2405.21060, section 6) as scalar-decay linear attention.

h_t = e^{a dt_t} h_{t-1} + dt_t b_t x_t',     y_t = c_t' h_t + d x_t
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.linear_attention import linear_attention, linear_attention_step


def _repeat_groups(op, x, num_heads):
    groups = x.shape[-2]
    if num_heads % groups:
        raise ValueError(f"{op}: b and c have {groups} groups, which do not divide {num_heads} heads")
    return jnp.repeat(x, num_heads // groups, axis=-2)


def ssd(x, dt, a, b, c, d=None, *, initial_state=None, segment_ids=None, chunk_size=None, implementation=None):
    """Mamba-2's sequence transformation.

    Args:
      x: [B, T, H, P] inputs.
      dt: [B, T, H] step sizes, after softplus.
      a: [H], negative.
      b, c: [B, T, G, N] with G dividing H: input and output matrices.
      d: [H] skip weights, or None.
      initial_state, segment_ids, chunk_size, implementation: as in `linear_attention`.

    Returns:
      y [B, T, H, P] in x's dtype and the final state [B, H, N, P] in float32.

    Raises:
      ValueError: a shape does not fit the others.
    """
    b, c = (_repeat_groups("ssd", m, x.shape[2]) for m in (b, c))
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    v = (x * dt[..., None]).astype(x.dtype)
    y, state = linear_attention(
        c,
        b,
        v,
        dt * a,
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return (y if d is None else y + (d[:, None] * x).astype(y.dtype)), state


def ssd_step(x, dt, a, b, c, d=None, *, state):
    """One token: x [B,H,P], dt [B,H], b and c [B,G,N], state [B,H,N,P] -> (y [B,H,P], state)."""
    b, c = (_repeat_groups("ssd_step", m, x.shape[1]) for m in (b, c))
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    y, state = linear_attention_step(c, b, (x * dt[..., None]).astype(x.dtype), dt * a, state=state, scale=1.0)
    return (y if d is None else y + (d[:, None] * x).astype(y.dtype)), state
