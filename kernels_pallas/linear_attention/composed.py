"""What `linear_attention` takes besides q, k, v and decays, for the forms that do not know it: groups, the scales and the skip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.contract import LinearAttention, PlainLinearAttention
from kernels_pallas.heads import repeat_heads


def scaled_values(wide: jax.Array, value_scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """Returns v [..., H, V], given in the dtype of sums, times value_scale [..., H], in `dtype`."""
    return (wide if value_scale is None else wide * value_scale[..., None]).astype(dtype)


def with_skip(o: jax.Array, skip: jax.Array | None, wide: jax.Array) -> jax.Array:
    """Returns o + skip v in o's dtype, of o [..., H, V], skip [H] and v [..., H, V], given in the dtype of sums."""
    return o if skip is None else (o.astype(wide.dtype) + skip[:, None] * wide).astype(o.dtype)


def with_own(
    o: jax.Array,
    q: jax.Array,
    k: jax.Array,
    wide: jax.Array,
    value_scale: jax.Array | None,
    own_scale: jax.Array | None,
    scale: float,
    together: int,
) -> jax.Array:
    """Returns o [B, T, H, V], computed without `own_scale`, as with it, in o's dtype; o itself if there is none.

    Args:
      q, k: [B, T, H, K].
      wide: v [B, T, H, V] in the dtype of sums.
      value_scale, own_scale, scale, together: of `linear_attention`.
    """
    if own_scale is None:
        return o
    (B, T), R, dtype = o.shape[:2], together, wide.dtype
    q, k, v, own = (x.reshape(B, T // R, R, *x.shape[2:]) for x in (q, k, wide, own_scale))
    later = jnp.ones_like(own) if value_scale is None else value_scale.reshape(own.shape)
    causal = jnp.tril(jnp.ones((R, R), dtype))[:, :, None]
    missing = own[:, :, None] - causal * later[:, :, None]  # [B, T / R, outputs, inputs, H]
    scores = missing * jnp.einsum("btrhk,btshk->btrsh", q, k, preferred_element_type=dtype)
    extra = jnp.einsum("btrsh,btshv->btrhv", scores if scale == 1 else scale * scores, v)
    return (o + extra.reshape(o.shape)).astype(o.dtype)


def composed(run: PlainLinearAttention) -> LinearAttention:
    """Returns an implementation of `linear_attention` from one for as many heads of k and v as of q, without scales and skip."""

    def implementation(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array,
        value_scale: jax.Array | None,
        own_scale: jax.Array | None,
        skip: jax.Array | None,
        state: jax.Array,
        segments: jax.Array | None,
        scale: float,
        chunk_size: int | None,
        together: int,
    ) -> tuple[jax.Array, jax.Array]:
        H, dtype = q.shape[2], state.dtype
        k, v = repeat_heads(k, H), repeat_heads(v, H)
        wide = v.astype(dtype)  # once: the gradients of its uses are added up before they are rounded
        o, final = run(q, k, scaled_values(wide, value_scale, v.dtype), log_decay, state, segments, scale, chunk_size)
        o = with_own(o, q, k, wide, value_scale, own_scale, scale, together)
        return with_skip(o, skip, wide), final

    return implementation
