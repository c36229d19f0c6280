"""Mamba-2's state-space duality (arXiv 2405.21060, section 6) as scalar-decay linear attention.

h_t = e^{a dt_t} h_{t-1} + dt_t b_t x_t',     y_t = c_t' h_t + d x_t
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import check_shapes
from kernels_pallas.linear_attention import linear_attention, linear_attention_step


def _repeat_groups(op: str, x: jax.Array, num_heads: int) -> jax.Array:
    """Returns x [..., G, N] as [..., num_heads, N]: each group serves as many heads as its neighbours."""
    groups = x.shape[-2]
    if num_heads % groups:
        raise ValueError(f"{op}: b and c have {groups} groups, which do not divide {num_heads} heads")
    return jnp.repeat(x, num_heads // groups, axis=-2)


def ssd_inputs(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (q, k, v, log_decay) of the linear attention with scale 1 that equals Mamba-2's transformation without `d x`.

    Args:
      x, dt, a, b, c: as in `ssd`, or without T as in `ssd_step`.

    Raises:
      ValueError: dt or a does not fit x, or the groups of b and c do not divide its heads.
    """
    H, rows = x.shape[-2], " ".join("BT"[: x.ndim - 2])
    dims = dict(zip(f"{rows} H".split(), x.shape, strict=False))
    check_shapes("ssd", dims, dt=(dt, f"{rows} H"), a=(a, "H"))
    b, c = (_repeat_groups("ssd", m, H) for m in (b, c))
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    return c, b, (x * dt[..., None]).astype(x.dtype), dt * a


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
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
    q, k, v, log_decay = ssd_inputs(x, dt, a, b, c)
    y, state = linear_attention(
        q,
        k,
        v,
        log_decay,
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return _skip(y, d, x), state


def ssd_step(
    x: jax.Array,  # [B, H, P]
    dt: jax.Array,  # [B, H]
    a: jax.Array,  # [H]
    b: jax.Array,  # [B, G, N]
    c: jax.Array,  # [B, G, N]
    d: jax.Array | None = None,  # [H]
    *,
    state: jax.Array,  # [B, H, N, P]
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, H, P], the state after one token); the arguments are those of `ssd` without T.

    Raises:
      ValueError: a shape does not fit the others.
    """
    q, k, v, log_decay = ssd_inputs(x, dt, a, b, c)
    y, state = linear_attention_step(q, k, v, log_decay, state=state, scale=1.0)
    return _skip(y, d, x), state


def _skip(y: jax.Array, d: jax.Array | None, x: jax.Array) -> jax.Array:
    """Returns y + d x in y's dtype, of y and x [..., H, P]; d is [H] or None."""
    check_shapes("ssd", dict(H=x.shape[-2]), d=(d, "H"))
    return y if d is None else y + (d[:, None] * x).astype(y.dtype)
