"""Mamba-2's state-space duality (arXiv 2405.21060, section 6) as scalar-decay linear attention.

h_t = e^{a dt_t} h_{t-1} + dt_t b_t x_t',     y_t = c_t' h_t + d x_t
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import check_shapes
from kernels_pallas.heads import grouped, repeat_heads
from kernels_pallas.linear_attention import linear_attention, linear_attention_step


class LinearAttentionInputs(NamedTuple):
    """The arguments of the linear attention with scale 1 that equals Mamba-2's transformation without `d x`; axes as in `ssd`.

    Attributes:
      q: [B, T, H, N], c of all heads.
      k: [B, T, G, N], b.
      v: [B, T, Hx, P], x.
      log_decay: [B, T, H], a dt.
      value_scale: [B, T, H], dt in float32.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    value_scale: jax.Array


def ssd_inputs(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> LinearAttentionInputs:
    """Returns the linear attention with scale 1 that equals Mamba-2's transformation without `d x`.

    Args:
      x, dt, a, b, c: as in `ssd`, or without T as in `ssd_step`.

    Raises:
      ValueError: dt or a does not fit x, or the heads of x or the groups of b or c are no divisor of dt's heads.
    """
    rows = " ".join("BT"[: x.ndim - 2])
    dims = dict(zip(f"{rows} H".split(), x.shape, strict=False))
    if dt.ndim == x.ndim - 1 and dt.shape[-1] % x.shape[-2] == 0:
        dims["H"] = dt.shape[-1]
    check_shapes("ssd", dims, dt=(dt, f"{rows} H"), a=(a, "H"))
    grouped("ssd", dims, "dt", x=x, b=b, c=c)
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    return LinearAttentionInputs(repeat_heads(c, dims["H"]), b, x, dt * a, dt)


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
      x: [B, T, Hx, P] inputs, Hx a divisor of H: head h reads head h // (H / Hx), as if each head were repeated in place.
      dt: [B, T, H] step sizes, after softplus.
      a: [H], negative.
      b, c: [B, T, G, N] with G dividing H, not necessarily the same: input and output matrices.
      d: [H] skip weights, or None.
      initial_state, segment_ids, chunk_size, implementation: as in `linear_attention`.

    Returns:
      y [B, T, H, P] in x's dtype and the final state [B, H, N, P] in float32.

    Raises:
      ValueError: a shape does not fit the others.
    """
    *arrays, value_scale = ssd_inputs(x, dt, a, b, c)
    check_shapes("ssd", dict(H=dt.shape[-1]), d=(d, "H"))
    return linear_attention(
        *arrays,
        value_scale=value_scale,
        skip=d,
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def ssd_step(
    x: jax.Array,  # [B, Hx, P]
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
    *arrays, value_scale = ssd_inputs(x, dt, a, b, c)
    check_shapes("ssd", dict(H=dt.shape[-1]), d=(d, "H"))
    return linear_attention_step(*arrays, value_scale=value_scale, skip=d, state=state, scale=1.0)
