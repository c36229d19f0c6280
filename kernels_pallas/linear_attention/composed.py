"""What `linear_attention` takes besides q, k, v and decays, for the forms that do not know it: groups, `value_scale`, `skip`."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from kernels_pallas.contract import LinearAttention, PlainLinearAttention
from kernels_pallas.heads import repeat_heads


def scaled_values(wide: jax.Array, value_scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """Returns v [..., H, V], given in the dtype of sums, times value_scale [..., H], in `dtype`."""
    return (wide if value_scale is None else wide * value_scale[..., None]).astype(dtype)


def with_skip(o: jax.Array, skip: jax.Array | None, wide: jax.Array) -> jax.Array:
    """Returns o + skip v in o's dtype, of o [..., H, V], skip [H] and v [..., H, V], given in the dtype of sums."""
    return o if skip is None else (o.astype(wide.dtype) + skip[:, None] * wide).astype(o.dtype)


def composed(run: PlainLinearAttention) -> LinearAttention:
    """Returns an implementation of `linear_attention` from one for as many heads of k and v as of q, without the two scalars."""

    def implementation(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array,
        value_scale: jax.Array | None,
        skip: jax.Array | None,
        state: jax.Array,
        segments: jax.Array | None,
        scale: float,
        chunk_size: int | None,
    ) -> tuple[jax.Array, jax.Array]:
        H, dtype = q.shape[2], state.dtype
        k, v = repeat_heads(k, H), repeat_heads(v, H)
        wide = v.astype(dtype)  # once: the gradients of its two uses are added up before they are rounded
        o, final = run(q, k, scaled_values(wide, value_scale, v.dtype), log_decay, state, segments, scale, chunk_size)
        return with_skip(o, skip, wide), final

    return implementation
