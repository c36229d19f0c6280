"""Softmax attention of a block of queries over a block of keys, as a part of a larger softmax.

The forward gives the normalized output and the log-sum-exp of its scores, by which parts are merged; the backward
takes the complete softmax's log-sum-exp and output. On TPU both are JAX's splash attention kernels, elsewhere XLA over
tiles of queries and keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_mask_info

from kernels_pallas.arguments import accumulator, alike, backend
from kernels_pallas.operands import pad_axis

EMPTY = -1e30  # the log-sum-exp of a query that sees no key
TILE = 1024  # queries and keys of a tile of the XLA form, at most
CPU_TILE = 128  # the same on CPUs, where the scores of a tile should stay in the cache
LANES = 128


class Mask(NamedTuple):
    """Query i sees key j where `nearest` <= i + offset - j < `window`, in tokens; None: no limit on that side.

    Scores s of the keys that are seen count as soft_cap * tanh(s / soft_cap) (Gemma 2); None: as they are.
    """

    nearest: int | None = 0
    window: int | None = None
    offset: int = 0
    soft_cap: float | None = None

    def visible(self, i: jax.Array, j: jax.Array) -> jax.Array:
        distance = i[:, None] + self.offset - j[None, :]
        seen = jnp.ones(distance.shape, bool)
        if self.nearest is not None:
            seen &= distance >= self.nearest
        return seen if self.window is None else seen & (distance < self.window)

    def shows(self, T: int, S: int) -> bool:
        """Whether any of T queries sees any of S keys."""
        return bool(len(visible_tiles(self, T, S, max(T, S))))


FULL = Mask(nearest=None)


def block_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array]:
    """One block's attention; scores are q k' D^-0.5, behind the mask's soft cap.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, Hkv, D], Hkv dividing H.
      q_segments, k_segments: [B, T], [B, S]; a query sees its own segment only.

    Returns:
      o [B, T, H, D] and lse [B, H, T], both float32; zeros and `EMPTY` for a query that sees nothing.
    """
    if not mask.shows(q.shape[1], k.shape[1]):
        return jnp.zeros(q.shape, accumulator(q)), jnp.full((len(q), q.shape[2], q.shape[1]), EMPTY, accumulator(q))
    if _use_splash(q, k):
        return _splash_forward(q, k, v, q_segments, k_segments, mask)
    return _tiled_forward(mask, (q, q_segments), (k, v, k_segments))


def block_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    mask: Mask,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The block's share of dq, dk, dv (float32), given the complete softmax's o and lse and the cotangent of o."""
    if not mask.shows(q.shape[1], k.shape[1]):
        dq, dk, dv = (jnp.zeros(x.shape, accumulator(x)) for x in (q, k, v))
        return dq, dk, dv
    if _use_splash(q, k):
        return _splash_backward(q, k, v, q_segments, k_segments, mask, o, lse, do)
    delta = jnp.sum(o.astype(lse.dtype) * do.astype(lse.dtype), axis=-1)
    return _tiled_backward(mask, (q, q_segments, do, lse.swapaxes(1, 2), delta), (k, v, k_segments))


# XLA, tile by tile -------------------------------------------------------------------------------------------------


def _tiles(x, tile):
    """[B, T, ...] -> [T / tile, B, tile, ...], padded with zeros."""
    x = pad_axis(x, 1, tile)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)


def _untile(x, length):
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def soft_capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Returns soft_cap * tanh(scores / soft_cap); None: the scores."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _scores(q, k, q_segments, k_segments, visible, soft_cap):
    """Scores [B, Hkv, G, T, S] and where they count."""
    B, T, H, D = q.shape
    Hkv = k.shape[2]
    s = jnp.einsum("bthgd,bshd->bhgts", q.reshape(B, T, Hkv, H // Hkv, D), k, preferred_element_type=accumulator(q))
    seen = visible & (q_segments[:, :, None] == k_segments[:, None, :])
    return soft_capped(s * D**-0.5, soft_cap), seen[:, None, None]


def _tile_forward(q, q_segments, k, v, k_segments, visible, *, soft_cap):
    B, T, H, D = q.shape
    s, seen = _scores(q, k, q_segments, k_segments, visible, soft_cap)
    s = jnp.where(seen, s, EMPTY)
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(s - top), 0)
    total = jnp.sum(p, axis=-1)
    o = jnp.einsum("bhgts,bshd->bthgd", p.astype(v.dtype), v, preferred_element_type=s.dtype).reshape(B, T, H, D)
    some = total > 0
    lse = jnp.where(some, top[..., 0] + jnp.log(jnp.where(some, total, 1)), EMPTY)
    total = jnp.where(some, total, 1).transpose(0, 3, 1, 2).reshape(B, T, H)
    return o / total[..., None], lse.reshape(B, H, T)


def merge(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two parts (o, lse) of a softmax as one."""
    (o1, lse1), (o2, lse2) = first, second
    ratio = jnp.exp(-jnp.abs(lse1 - lse2))  # of the smaller total to the larger one
    w1 = (jnp.where(lse1 >= lse2, 1, ratio) / (1 + ratio)).swapaxes(1, 2)[..., None]
    return o2 + w1 * (o1 - o2), jnp.maximum(lse1, lse2) + jnp.log(1 + ratio)


def _tile_size(mask: Mask) -> int:
    """The largest tile of the backend, or about the width of a narrower window: of two tiles that a query meets at most half is in
    vain."""
    largest = min(TILE, CPU_TILE) if backend() == "cpu" else TILE
    if mask.nearest is None or mask.window is None:
        return largest
    width = max(mask.window - mask.nearest, 1)
    return min(largest, max(LANES, 1 << (width - 1).bit_length()))


def visible_tiles(mask: Mask, T: int, S: int, tile: int) -> np.ndarray:
    """[n, 2] the tiles (of T queries, of S keys) between which the mask shows anything, by tiles of queries."""
    i0, j0 = np.arange(0, T, tile)[:, None], np.arange(0, S, tile)
    i1, j1 = np.minimum(i0 + tile, T) - 1, np.minimum(j0 + tile, S) - 1
    farthest, nearest = i1 + mask.offset - j0, i0 + mask.offset - j1
    seen = np.ones(farthest.shape, bool)
    if mask.nearest is not None:
        seen &= farthest >= mask.nearest
    if mask.window is not None:
        seen &= nearest < mask.window
    return np.argwhere(seen).astype(np.int32)


def _over_tiles(mask, queries, keys, results, step):
    """Runs `step` over the tiles of queries and keys that the mask shows, one after the other.

    Tiles whose segments have no id in common are passed over when the program runs: at most those whose ranges of ids
    do not meet in any row.

    Args:
      queries, keys: arrays [B, T, ...], [B, S, ...]; the segments come second in `queries` and last in `keys`.
      results: (tile of queries, tile of keys, tile) -> the arrays that the steps add to, in tiles.
      step: (results, i, j, tile of queries, tile of keys, visible) -> results.
    """
    T, S, tile = queries[0].shape[1], keys[0].shape[1], _tile_size(mask)
    q_tiles, k_tiles = (tuple(_tiles(x, tile) for x in xs) for xs in (queries, keys))

    def one(results, pair):
        i, j = pair
        mine, theirs = (jax.tree.map(lambda x, n=n: x[n], tiles) for tiles, n in ((q_tiles, i), (k_tiles, j)))
        at_i, at_j = i * tile + jnp.arange(tile), j * tile + jnp.arange(tile)

        def compute(results):
            visible = mask.visible(at_i, at_j) & (at_i < T)[:, None] & (at_j < S)
            return step(results, i, j, mine, theirs, visible)

        (q_low, q_high), (k_low, k_high) = _id_range(mine[1], at_i < T), _id_range(theirs[-1], at_j < S)
        meet = jnp.any((q_low <= k_high) & (k_low <= q_high))
        return jax.lax.cond(meet, compute, lambda results: results, results), None

    pairs = visible_tiles(mask, T, S, tile)
    start, *_ = alike("attention", results(q_tiles, k_tiles, tile), q_tiles, k_tiles)
    return jax.lax.scan(one, start, (pairs[:, 0], pairs[:, 1]))[0]


def _id_range(segment_ids, real):
    """[B] the smallest and the largest id of each row's real tokens."""
    limits = jnp.iinfo(segment_ids.dtype)
    low = jnp.min(jnp.where(real, segment_ids, limits.max), axis=1)
    return low, jnp.max(jnp.where(real, segment_ids, limits.min), axis=1)


def _tiled_forward(mask, queries, keys):
    """Forward over tiles: of each tile of queries a running merge over the tiles of keys that it sees."""
    (q, _), T, S = queries, queries[0].shape[1], keys[0].shape[1]
    if max(T, S) <= _tile_size(mask):
        return _tile_forward(*(*queries, *keys, mask.visible(jnp.arange(T), jnp.arange(S))), soft_cap=mask.soft_cap)
    B, _, H, D = q.shape
    dtype = accumulator(q)

    def nothing(q_tiles, _, tile):
        n = len(q_tiles[0])
        return jnp.zeros((n, B, tile, H, D), dtype), jnp.full((n, B, H, tile), EMPTY, dtype)

    def add(parts, i, _, queries, keys, visible):
        merged = merge(tuple(x[i] for x in parts), _tile_forward(*(*queries, *keys, visible), soft_cap=mask.soft_cap))
        return tuple(x.at[i].set(y) for x, y in zip(parts, merged, strict=True))

    o, lse = _over_tiles(mask, queries, keys, nothing, add)
    return _untile(o, T), _untile(lse.swapaxes(2, 3), T).swapaxes(1, 2)


def _tile_backward(q, q_segments, do, lse, delta, k, v, k_segments, visible, *, soft_cap):
    B, T, H, D = q.shape
    s, seen = _scores(q, k, q_segments, k_segments, visible, soft_cap)
    groups = (B, T, k.shape[2], H // k.shape[2])
    lse, delta = (x.reshape(groups).transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))
    do = do.reshape(*groups, D)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - lse, 0)), 0)
    dv = jnp.einsum("bhgts,bthgd->bshd", p.astype(do.dtype), do, preferred_element_type=s.dtype)
    dp = jnp.einsum("bthgd,bshd->bhgts", do, v, preferred_element_type=s.dtype)
    slope = 1 if soft_cap is None else 1 - (s / soft_cap) ** 2  # of the soft cap
    ds = (p * (dp - delta) * slope * D**-0.5).astype(q.dtype)
    dq = jnp.einsum("bhgts,bshd->bthgd", ds, k, preferred_element_type=s.dtype).reshape(B, T, H, D)
    return dq, jnp.einsum("bhgts,bthgd->bshd", ds, q.reshape(*groups, D), preferred_element_type=s.dtype), dv


def _tiled_backward(mask, queries, keys):
    T, S = queries[0].shape[1], keys[0].shape[1]
    if max(T, S) <= _tile_size(mask):
        return _tile_backward(*(*queries, *keys, mask.visible(jnp.arange(T), jnp.arange(S))), soft_cap=mask.soft_cap)

    def zeros(q_tiles, k_tiles, _):
        return tuple(jnp.zeros(x.shape, accumulator(x)) for x in (q_tiles[0], *k_tiles[:2]))

    def add(grads, i, j, queries, keys, visible):
        more = _tile_backward(*(*queries, *keys, visible), soft_cap=mask.soft_cap)
        return tuple(x.at[n].add(y) for x, n, y in zip(grads, (i, j, j), more, strict=True))

    dq, dk, dv = _over_tiles(mask, queries, keys, zeros, add)
    return _untile(dq, T), _untile(dk, S), _untile(dv, S)


# TPU: splash attention -------------------------------------------------------------------------------------------


def _use_splash(q, k) -> bool:
    return backend() == "tpu" and q.shape[1] % LANES == 0 and k.shape[1] % LANES == 0 and q.dtype != jnp.float64


@functools.lru_cache
def _splash_kernel(mask: Mask, T: int, S: int, heads: int, interpret: bool):
    """The kernel's mask tables and block sizes; the tables are numpy work, done once for each shape."""
    bq, bk = (next(b for b in (512, 256, LANES) if n % b == 0) for n in (T, S))
    left = None if mask.window is None else mask.window - 1
    right = None if mask.nearest is None else -mask.nearest
    one = splash_mask.FullMask((T, S))
    if left is not None or right is not None:
        one = splash_mask.LocalMask((T, S), (left, right), mask.offset)
    blocks = splash.BlockSizes(
        block_q=bq,
        block_kv=bk,
        block_kv_compute=bk,
        block_q_dkv=bq,
        block_kv_dkv=bk,
        block_kv_dkv_compute=bk,
        block_q_dq=bq,
        block_kv_dq=bk,
    )
    every_head = splash_mask.MultiHeadMask([one] * heads)
    shards = dict(head_shards=1, q_seq_shards=1)
    # by numpy alone: JAX arrays cannot be made while a program for absent devices is traced
    tables, function = splash_mask_info.process_mask(every_head, (bq, bk), **shards)
    dkv_tables, _ = splash_mask_info.process_mask_dkv(every_head, (bq, bk), **shards)
    return splash.SplashAttentionKernel(
        tables,
        tables,
        dkv_tables,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=True,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=mask.soft_cap,
        residual_checkpoint_name=None,
        mask_function=function,
        interpret=interpret,
    )


def _heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def _splash_forward(q, k, v, q_segments, k_segments, mask):
    kernel = _splash_kernel(mask, q.shape[1], k.shape[1], q.shape[2], interpret=backend() != "tpu")

    def row(q, k, v, q_segments, k_segments):
        return kernel(q, k, v, splash.SegmentIds(q_segments, k_segments))

    scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    scaled, k, v = map(_heads_first, (scaled, k, v))
    o, (lse,) = jax.vmap(row)(scaled, k, v, q_segments, k_segments)
    return _heads_first(o).astype(jnp.float32), jnp.maximum(lse, EMPTY)


def _splash_backward(q, k, v, q_segments, k_segments, mask, o, lse, do):
    kernel = _splash_kernel(mask, q.shape[1], k.shape[1], q.shape[2], interpret=backend() != "tpu")
    options = {n: kernel.kwargs[n] for n in ("mask_value", "is_mqa", "block_sizes", "mask_function", "attn_logits_soft_cap")}
    scale = q.shape[-1] ** -0.5

    def row(q, k, v, q_segments, k_segments, o, lse, do):
        ids = splash.SegmentIds(q_segments, k_segments)
        residuals = (q, k, v, ids, None, o, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        # JAX has no public function for the gradient of a part, given the log-sum-exp of all parts. If this one's arguments change,
        # tests/parallel/test_splash.py fails, which compares it with attention in float64; forward passes do not need it.
        grads = splash._splash_attention_bwd(
            save_residuals=False,
            residual_checkpoint_name=None,
            interpret=kernel.kwargs["interpret"],
            res=residuals,
            do=do,
            **options,
        )
        return grads[3:6]

    scaled = (q * scale).astype(q.dtype)
    scaled, k, v, o, do = map(_heads_first, (scaled, k, v, o, do))
    grads = jax.vmap(row)(scaled, k, v, q_segments, k_segments, o, lse, do)
    dq, dk, dv = (_heads_first(x).astype(jnp.float32) for x in grads)
    return dq * scale, dk, dv
