"""Mamba-2's state-space duality (arXiv 2405.21060, section 6) as scalar-decay linear attention.

h_t = e^{a dt_t} h_{t-1} + dt_t b_t x_t',     y_t = c_t' h_t + d x_t
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.arguments import check_shapes
from kernels_pallas.linear_attention import linear_attention, linear_attention_step


def _repeat_groups(op, x, num_heads):
    groups = x.shape[-2]
    if num_heads % groups:
        raise ValueError(f"{op}: b and c have {groups} groups, which do not divide {num_heads} heads")
    return jnp.repeat(x, num_heads // groups, axis=-2)


def ssd_inputs(x, dt, a, b, c):
    """(q, k, v, log_decay) of the linear attention (scale 1) that the duality makes of x, dt, a, b, c, without `d x`.

    Raises:
      ValueError: dt or a does not fit x, or the groups of b and c do not divide its heads.
    """
    H, rows = x.shape[-2], " ".join("BT"[: x.ndim - 2])
    dims = dict(zip(f"{rows} H".split(), x.shape, strict=False))
    check_shapes("ssd", dims, dt=(dt, f"{rows} H"), a=(a, "H"))
    b, c = (_repeat_groups("ssd", m, H) for m in (b, c))
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    return c, b, (x * dt[..., None]).astype(x.dtype), dt * a


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
    y, state = linear_attention(
        *ssd_inputs(x, dt, a, b, c),
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return _skip(y, d, x), state


def ssd_step(x, dt, a, b, c, d=None, *, state):
    """One token: x [B,H,P], dt [B,H], b and c [B,G,N], state [B,H,N,P] -> (y [B,H,P], state)."""
    y, state = linear_attention_step(*ssd_inputs(x, dt, a, b, c), state=state, scale=1.0)
    return _skip(y, d, x), state


def _skip(y, d, x):
    """y + d x, in y's dtype; d is [H] or None."""
    check_shapes("ssd", dict(H=x.shape[-2]), d=(d, "H"))
    return y if d is None else y + (d[:, None] * x).astype(y.dtype)
