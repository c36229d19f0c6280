"""Causal softmax attention: on one device, with halos for windows, or around a ring.

A softmax over several parts (blocks of keys that arrive over the ring, a window of tokens beside a window of
memory) is merged from the parts' outputs and log-sum-exps; the gradient of a part needs only those of the complete softmax.
Ring attention: arXiv 2310.01889; the zig-zag order balances its causal work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.parallel.attention_block import Mask, block_backward, block_forward, merge
from hybrid_jax.parallel.attention_cudnn import attend_documents, cudnn_applies
from hybrid_jax.parallel.sequence import SEQ_AXIS, as_chunks, as_rows, from_pair, halo, halo_segments, to_pair
from hybrid_jax.parallel.sharding import TOKENS, axis_size, shard_map_by_axes
from kernels_pallas.arguments import differentiable

SAVED = "attention"  # what a rematerialization policy may keep: each attention's output and log-sum-exp


class Part(NamedTuple):
    """Queries [B,T,H,D] and the keys and values [B,S,Hkv,D] they see through `mask`, with the keys' segments [B,S]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    k_segments: jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None = None,
    *,
    soft_cap: float | None = None,
    head_axis: str | None = "heads",
) -> jax.Array:
    """Returns causal attention within segments, o [B, T, H, D] in q's dtype.

    Args:
      q: [B, T, H, D], normed and rotated.
      k, v: [B, T, Hkv, D].
      segment_ids: [B, T].
      window: keys a query sees, itself included; None for all.
      soft_cap: of the scores, see `attention_block.Mask`; None: there is none.
      head_axis: the logical axis of the heads; None: every device along `tensor` has all heads.
    """
    T, n, heads = q.shape[1], axis_size("seq"), (*TOKENS, head_axis)
    if window is not None and window >= T:
        window = None
    if takes_ring(window, T, n):
        ring = functools.partial(_ring, window, soft_cap)
        return shard_map_by_axes(ring, (q, k, v, segment_ids), (heads, heads, heads, TOKENS), heads)
    if n == 1 and soft_cap is None and cudnn_applies(q):
        one = functools.partial(attend_documents, window, functools.partial(_packed, window))
        return shard_map_by_axes(one, (q, k, v, segment_ids), (heads, heads, heads, TOKENS), heads)
    return attend_windows((q,), (k,), (v,), ((0, window),), segment_ids, soft_cap=soft_cap, head_axis=head_axis)


def _packed(window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns the attention of a device's packed rows, tile by tile."""
    return _at_hand(((0, window),), None, segment_ids, (q,), (k,), (v,))


def takes_ring(window: int | None, tokens: int, devices: int) -> bool:
    """Returns whether keys are sent around the ring of mesh axis `seq`, for rows of `tokens`: without a window, or where a chunk
    and its halo have more keys than a chunk meets in the ring, which is half of the row."""
    return devices > 1 and (window is None or window + tokens // (2 * devices) > tokens // 2)


def _ring(window, soft_cap, q, k, v, segment_ids):
    return ring_attention(q, k, v, segment_ids, window, soft_cap)


def attend_windows(
    qs: Sequence,
    ks: Sequence,
    vs: Sequence,
    windows: Sequence[tuple[int, int | None]],
    segment_ids: jax.Array,
    *,
    soft_cap: float | None = None,
    head_axis: str | None = "heads",
) -> jax.Array:
    """Returns one softmax over several sets of keys, where set n is seen at distances windows[n][0] <= i - j < windows[n][1].

    Each set has its own queries [B,T,H,D], keys and values [B,T,Hkv,D]. A window may be None, without an end, only where
    tokens are not sharded. `soft_cap` and `head_axis` are as in `attend`.
    """
    heads = (*TOKENS, head_axis)
    local = functools.partial(_by_halo if axis_size("seq") > 1 else _at_hand, tuple(windows), soft_cap)
    return shard_map_by_axes(local, (segment_ids, tuple(qs), tuple(ks), tuple(vs)), (TOKENS, heads, heads, heads), heads)


def _at_hand(windows, soft_cap, segment_ids, qs, ks, vs):
    parts = tuple(Part(q, k, v, segment_ids) for q, k, v in zip(qs, ks, vs, strict=True))
    return parts_attention(parts, segment_ids, tuple(Mask(*w, soft_cap=soft_cap) for w in windows))


def _by_halo(windows, soft_cap, segment_ids, qs, ks, vs):
    """Attends with tokens sharded: each chunk sees a halo of the tokens that its windows reach, at most the row's."""
    segments = to_pair(segment_ids)
    c = segments.shape[2]
    row = (2 * jax.lax.axis_size(SEQ_AXIS) - 1) * c  # tokens before the last chunk
    parts, masks = [], []
    for q, k, v, (nearest, window) in zip(qs, ks, vs, windows, strict=True):
        reach = window - 1
        before = min(-reach % 128 + reach if c >= 128 else reach, row)  # whole tiles of a TPU

        def extended(x, before=before):
            chunks = to_pair(x)
            return as_rows(jnp.concatenate([halo(chunks, before), chunks], axis=2))

        ids = as_rows(jnp.concatenate([halo_segments(segments, before), segments], axis=2))
        parts.append(Part(as_rows(to_pair(q)), extended(k), extended(v), ids))
        masks.append(Mask(nearest, window, before, soft_cap))
    return from_pair(as_chunks(parts_attention(tuple(parts), as_rows(segments), tuple(masks))))


# A softmax over parts on this device ---------------------------------------------------------------------------


@differentiable(2)
def parts_attention(parts: tuple[Part, ...], segment_ids: jax.Array, masks: tuple[Mask, ...]) -> jax.Array:
    """Returns one softmax over every part's keys, o [B, T, H, D] in q's dtype; a query that sees no key gets zeros."""
    return _parts_forward(parts, segment_ids, masks)[0]


def _parts_forward(parts, segment_ids, masks):
    outs = [block_forward(p.q, p.k, p.v, segment_ids, p.k_segments, m) for p, m in zip(parts, masks, strict=True)]
    o, lse = functools.reduce(merge, outs)
    o, lse = checkpoint_name((o.astype(parts[0].q.dtype), lse), SAVED)
    return o, (parts, segment_ids, o, lse)


def _parts_backward(masks, residuals, do):
    parts, segment_ids, o, lse = residuals
    grads = []
    for p, mask in zip(parts, masks, strict=True):
        d = block_backward(p.q, p.k, p.v, segment_ids, p.k_segments, mask, o, lse, do)
        grads.append(Part._make([*(x.astype(y.dtype) for x, y in zip(d, p[:3], strict=True)), None]))
    return tuple(grads), None


parts_attention.defvjp(_parts_forward, _parts_backward)


# A softmax whose keys arrive over the ring -------------------------------------------------------------------------


def _next(x):
    """Sends a pytree to the next device of the ring."""
    n = jax.lax.axis_size(SEQ_AXIS)
    return jax.lax.ppermute(x, SEQ_AXIS, [(i, (i + 1) % n) for i in range(n)])


@differentiable(4, 5)
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention of a device's two chunks over the row; inside `shard_map_by_axes`, in the zig-zag layout.

    In zig-zag order every remote chunk of keys is either fully visible or invisible to a chunk of queries. Our back chunk of
    queries sees the front chunk of keys of every device. Keys from a lower-numbered device: our front sees their front. From a
    higher-numbered one: our back sees their back. Either way a step of the ring is two pairs of chunks, 2c x c scores, on every
    device. The next keys are sent while the present ones are used; after n - 1 steps all n devices have seen all keys.

    Args:
      q: [B, 2c, H, D], a device's chunks of c tokens.
      k, v: [B, 2c, Hkv, D].
      segment_ids: [B, 2c].
      window: keys a query sees, itself included; None for all.
      soft_cap: as in `attend`.

    Returns:
      [B, 2c, H, D] in q's dtype.
    """
    return _ring_forward(q, k, v, segment_ids, window, soft_cap)[0]


def _pairs(step):
    """Returns the visible pairs for keys from `step` devices before: (queries' chunk, keys' chunk, distance in chunks)."""
    n, i = jax.lax.axis_size(SEQ_AXIS), jax.lax.axis_index(SEQ_AXIS)
    other = (i - step) % n
    same = jnp.where(i >= step, 0, 1)  # front and front, or back and back
    return (1, 0, 2 * n - 1 - i - other), (same, same, jnp.abs(i - other))


def _of_pair(block, pair, mask, queries, keys):
    """Returns block(queries, keys, mask) of two chunks; their distance, 1 or more, is known only when the program runs."""
    ours, theirs, distance = pair
    queries, keys = tuple(x[ours] for x in queries), tuple(x[theirs] for x in keys)
    full = mask._replace(nearest=None, window=None)
    if mask.window is None:
        return block(queries, keys, full)
    c, window = queries[0].shape[1], mask.window
    nothing, masks = Mask(None, 1 - c), []
    for d in range(1, 2 * jax.lax.axis_size(SEQ_AXIS)):
        part = full if (d + 1) * c <= window else mask._replace(nearest=None, offset=d * c)
        masks.append(part if part.shows(c, c) else nothing)
    different = list(dict.fromkeys(masks))
    which = jnp.asarray([different.index(mask) for mask in masks], jnp.int32)[distance - 1]
    return jax.lax.switch(which, [functools.partial(block, mask=mask) for mask in different], queries, keys)


def _alike(block, mask, queries, keys):
    """Returns the same for the device's own keys, front with front and back with back, [2, ...]."""
    queries, keys = (tuple(map(as_rows, xs)) for xs in (queries, keys))
    return tuple(map(as_chunks, block(queries, keys, mask)))


def _forward_block(queries, keys, mask):
    (q, q_segments), (k, v, k_segments) = queries, keys
    return block_forward(q, k, v, q_segments, k_segments, mask)


def _backward_block(queries, keys, mask):
    (q, q_segments, o, lse, do), (k, v, k_segments) = queries, keys
    return block_backward(q, k, v, q_segments, k_segments, mask, o, lse, do)


def _ring_forward(q, k, v, segment_ids, window, soft_cap):
    n, mask = jax.lax.axis_size(SEQ_AXIS), Mask(0, window, soft_cap=soft_cap)
    segments = to_pair(segment_ids)
    queries, keys = (to_pair(q), segments), (to_pair(k), to_pair(v), segments)

    def add(pair, keys, parts):
        at = pair[0]
        merged = merge(tuple(x[at] for x in parts), _of_pair(_forward_block, pair, mask, queries, keys))
        return tuple(jax.lax.dynamic_update_index_in_dim(x, y, at, 0) for x, y in zip(parts, merged, strict=True))

    def step(s, state):
        keys, parts = state
        for pair in _pairs(s):
            parts = add(pair, keys, parts)
        return parts

    coming = _next(keys)
    parts = add(_pairs(0)[0], keys, _alike(_forward_block, mask, queries, keys))
    state = jax.lax.fori_loop(1, n - 1, lambda s, state: (_next(state[0]), step(s, state)), (coming, parts))
    o, lse = step(n - 1, state)
    o, lse = checkpoint_name((from_pair(o).astype(q.dtype), lse), SAVED)
    return o, (q, k, v, segment_ids, o, lse)


def _ring_backward(window, soft_cap, residuals, do):
    """The gradients of keys are sent along with them, and arrive at their own device while it works on its own keys."""
    q, k, v, segment_ids, o, lse = residuals
    n, mask = jax.lax.axis_size(SEQ_AXIS), Mask(0, window, soft_cap=soft_cap)
    segments = to_pair(segment_ids)
    queries, keys = (to_pair(q), segments, to_pair(o), lse, to_pair(do)), (to_pair(k), to_pair(v), segments)

    def add(pair, keys, dq, dkv):
        more, *found = _of_pair(_backward_block, pair, mask, queries, keys)
        return dq.at[pair[0]].add(more), tuple(x.at[pair[1]].add(y) for x, y in zip(dkv, found, strict=True))

    def step(s, keys, dq, dkv):
        for pair in _pairs(s):
            dq, dkv = add(pair, keys, dq, dkv)
        return dq, dkv

    def one(s, state):
        keys, dq, dkv = state
        return _next(keys), *step(s, keys, dq, _next(dkv))

    coming = _next(keys)
    dq, *dkv = (jnp.zeros(x.shape, lse.dtype) for x in (queries[0], *keys[:2]))
    if n > 2:
        state = _next(coming), *step(1, coming, dq, dkv)
        coming, dq, dkv = jax.lax.fori_loop(2, n - 1, one, state)
        dkv = _next(dkv)
    dq, dkv = step(n - 1, coming, dq, dkv)
    arrived = _next(dkv)
    own = _alike(_backward_block, mask, queries, keys)
    dq, dkv = add(_pairs(0)[0], keys, dq + own[0], own[1:])
    dk, dv = (from_pair(x + y) for x, y in zip(arrived, dkv, strict=True))
    return from_pair(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attention.defvjp(_ring_forward, _ring_backward)
