"""The chunked view of a decaying recurrence, shared by every operation with a scalar decay per head.

For a chunk of C tokens with log decays g, a = cumsum(g) inside it and H0 the state at its start:

    mask   M[t, i] = e^{a_t - a_i}  for i <= t in the same segment, else 0
    reach  e^{a_t}                  where t still sees H0, else 0
    keep   e^{a_C - a_i}            where i still counts in the state at the chunk's end, else 0
    total  e^{a_C}                  if H0 survives the chunk, else 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.arguments import backend


def default_chunk() -> int:
    """Returns the tokens per chunk where the caller names none: 64, or 32 on a CPU, where the smaller chunk's fewer FLOPs count."""
    return 32 if backend() == "cpu" else 64


class ChunkDecay(NamedTuple):
    """The decays of every chunk (see the module): mask [N,B,H,C,C], reach [N,B,H,C], keep [N,B,H,C], total [N,B,H]."""

    mask: jax.Array
    reach: jax.Array
    keep: jax.Array
    total: jax.Array


def num_chunks(T: int, chunk_size: int) -> int:
    """Returns how many chunks hold T tokens."""
    return -(-T // chunk_size)


def to_chunks(x: jax.Array, chunk_size: int) -> jax.Array:
    """Returns x [B,T,H,...] as chunks [N,B,H,C,...], T padded with zeros to a multiple of the chunk."""
    B, T, H, *rest = x.shape
    N = num_chunks(T, chunk_size)
    x = jnp.pad(x, ((0, 0), (0, N * chunk_size - T)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, N, chunk_size, H, *rest)
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def from_chunks(x: jax.Array, T: int) -> jax.Array:
    """Returns chunks [N,B,H,C,D] as [B,T,H,D], without the padding."""
    N, B, H, C, D = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, D)[:, :T]


def chunk_segments(segments: jax.Array, chunk_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns segment numbers [N,B,C], where padding belongs to the last segment, and those carried into each chunk [N,B]."""
    B, T = segments.shape
    N = num_chunks(T, chunk_size)
    padded = jnp.pad(segments, ((0, 0), (0, N * chunk_size - T)), mode="edge")
    chunks = padded.reshape(B, N, chunk_size).transpose(1, 0, 2)
    carried = jnp.concatenate([jnp.zeros((1, B), chunks.dtype), chunks[:-1, :, -1]])
    return chunks, carried


FORGOTTEN = -1000.0  # a log decay that leaves nothing, in float64 too


def cumulative(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (coarse, fine) cumulative sums of g over its last dim, whose differences are exact to g's own rounding.

    A float32 cumsum over a chunk of strong decays reaches thousands, where one ulp is 1e-4: too coarse
    for the differences of its neighbours. The part of g on a grid of 1/64 adds up without rounding, as long as
    the sum of a chunk of 128 stays below 2^18: no g counts for less than `FORGOTTEN`. What remains stays small.
    """
    g = jnp.maximum(g, FORGOTTEN)
    coarse = jax.lax.stop_gradient(jnp.round(g * 64) / 64)
    earlier = jnp.triu(jnp.ones((g.shape[-1], g.shape[-1]), g.dtype))  # a matmul, which XLA does not fuse and repeat
    both = (jnp.matmul(x, earlier, precision="highest") for x in (coarse, g - coarse))
    coarse, fine = both
    return coarse, fine


def chunk_decay(log_decay: jax.Array, segments: jax.Array | None, chunk_size: int, dtype: DTypeLike) -> ChunkDecay:
    """Returns the decays of every chunk, from log_decay [B,T,H] and segment numbers [B,T] (None: one segment)."""
    g = to_chunks(log_decay.astype(dtype), chunk_size)
    coarse, fine = cumulative(g)

    def difference(later, earlier):
        return (later[0] - earlier[0]) + (later[1] - earlier[1])

    def masked_exp(x, where):  # masked before exp: no overflow, and no 0 * inf in its gradient
        return jnp.where(where, jnp.exp(jnp.where(where, x, 0.0)), 0.0)

    rows, cols = (coarse[..., :, None], fine[..., :, None]), (coarse[..., None, :], fine[..., None, :])
    inside = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))
    sees_start = survives = through = True
    if segments is not None:
        seg, carried = chunk_segments(segments, chunk_size)
        seg, carried = seg[:, :, None], carried[:, :, None, None]
        inside &= seg[..., :, None] == seg[..., None, :]
        sees_start, survives, through = seg == carried, seg == seg[..., -1:], (seg[..., -1:] == carried)[..., 0]
    last = (coarse[..., -1:], fine[..., -1:])
    return ChunkDecay(
        mask=masked_exp(difference(rows, cols), inside),
        reach=masked_exp(coarse + fine, sees_start),
        keep=masked_exp(difference(last, (coarse, fine)), survives),
        total=masked_exp(coarse[..., -1] + fine[..., -1], through),
    )


def matmul(equation: str, *operands: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the einsum, accumulated in `dtype`; float32 operands are multiplied at full precision, bf16 ones as they are."""
    low = all(x.dtype == jnp.bfloat16 for x in operands)
    precision = jax.lax.Precision.DEFAULT if low else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, *operands, preferred_element_type=dtype, precision=precision)


def chunk_states(k: jax.Array, v: jax.Array, decay: ChunkDecay, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the states before each chunk [N,B,H,K,V] and after the last [B,H,K,V], for S <- total S + (K keep)' V.

    Args:
      k, v: [N,B,H,C,K] and [N,B,H,C,V].
      initial: [B,H,K,V], in the dtype of sums.
    """
    dtype = initial.dtype
    local = matmul("nbhck,nbhcv->nbhkv", (k * decay.keep[..., None]).astype(k.dtype), v, dtype=dtype)

    def step(state, chunk):
        total, update = chunk
        return total[..., None, None] * state + update, state

    final, before = jax.lax.scan(step, initial, (decay.total, local))
    return before, final


def chunk_outputs(q: jax.Array, k: jax.Array, v: jax.Array, decay: ChunkDecay, before: jax.Array) -> jax.Array:
    """Returns (Q reach) H0 + ((Q K') M) V, [N,B,H,C,V], of q, k [N,B,H,C,K], v [N,B,H,C,V], H0 = `before` [N,B,H,K,V]."""
    dtype = before.dtype
    across = matmul("nbhck,nbhkv->nbhcv", (q * decay.reach[..., None]).astype(q.dtype), before.astype(q.dtype), dtype=dtype)
    scores = matmul("nbhck,nbhik->nbhci", q, k, dtype=dtype) * decay.mask
    return across + matmul("nbhci,nbhiv->nbhcv", scores.astype(v.dtype), v, dtype=dtype)


def scan_blocks(
    run: Callable[[Sequence[jax.Array], Any, jax.Array | None], tuple[jax.Array, Any]],
    arrays: Sequence[jax.Array],
    state: Any,
    segments: jax.Array | None,
    chunk_size: int,
) -> tuple[jax.Array, Any]:
    """Returns (o, state) of `run(arrays, state, segments)`, for all tokens at once or, on a CPU, chunk by chunk.

    The chunked forms do all chunks side by side and scan only the states: many small matmuls that an
    accelerator runs together. A CPU runs them one after another in any case, and is two to three times
    faster when the chunk it works on stays in its cache.

    Args:
      run: computes the output [B,T,H,...] and the state after some tokens; it takes any number of them.
      arrays: each [B,T,H,...].
      state: a pytree, before the first token.
      segments: [B,T] segment numbers, 0 first, or None.
      chunk_size: tokens of a block on a CPU.
    """
    B, T = arrays[0].shape[:2]
    if backend() != "cpu" or chunk_size >= T:
        return run(arrays, state, segments)
    N = num_chunks(T, chunk_size)

    def blocks(x, mode="constant"):
        x = jnp.pad(x, ((0, 0), (0, N * chunk_size - T)) + ((0, 0),) * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(B, N, chunk_size, *x.shape[2:]), 1, 0)

    if segments is not None:
        _, carried = chunk_segments(segments, chunk_size)
        segments = blocks(segments, "edge") - carried[..., None]  # the state's segment is number 0 in every block

    def step(state, block):
        arrays, segments = block
        o, state = run(arrays, state, segments)
        return state, o

    state, o = jax.lax.scan(step, state, (tuple(map(blocks, arrays)), segments))
    return jnp.moveaxis(o, 0, 1).reshape(B, N * chunk_size, *o.shape[3:])[:, :T], state
