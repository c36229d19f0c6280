"""Causal softmax attention wherever its tokens lie: on one device, by neighbours' windows, or around a ring.

A softmax over several parts (blocks of keys that arrive over the ring, a window of tokens beside a window of
memory) is merged from the parts' outputs and log-sum-exps; the gradient of every part needs only the whole's.
Ring attention: arXiv 2310.01889; the zig-zag order balances its causal work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.parallel.attention_block import CAUSAL, EMPTY, FULL, Mask, block_backward, block_forward, merge
from hybrid_jax.parallel.sequence import AXIS, as_chunks, as_rows, halo, halo_segments, join, split
from hybrid_jax.parallel.sharding import TOKENS, axis_size, per_device

HEADS = (*TOKENS, "heads")
SAVED = "attention"  # what a rematerialisation policy may keep: each attention's output and log-sum-exp


class Part(NamedTuple):
    """Queries [B,T,H,D] and the keys and values [B,S,Hkv,D] they see through `mask`, with the keys' segments [B,S]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    k_segments: jax.Array


def attend(q, k, v, segment_ids, window: int | None = None):
    """Causal attention within segments: o [B,T,H,D] in q's dtype.

    Args:
      q: [B, T, H, D], normed and rotated.
      k, v: [B, T, Hkv, D].
      segment_ids: [B, T].
      window: keys a query sees, itself included; None for all.
    """
    if window is None and axis_size("seq") > 1:
        return per_device(ring_attention, (q, k, v, segment_ids), (HEADS, HEADS, HEADS, TOKENS), HEADS)
    return attend_windows((q,), (k,), (v,), ((0, window),), segment_ids)


def attend_windows(qs: Sequence, ks: Sequence, vs: Sequence, windows: Sequence[tuple[int, int | None]], segment_ids):
    """One softmax over several sets of keys, set n seen at distances windows[n][0] <= i - j < windows[n][1].

    Each set has its own queries [B,T,H,D], keys and values [B,T,Hkv,D]. A window of None, without an end, only where
    tokens are not cut over the mesh.
    """
    local = functools.partial(_by_halo if axis_size("seq") > 1 else _at_hand, tuple(windows))
    return per_device(local, (segment_ids, tuple(qs), tuple(ks), tuple(vs)), (TOKENS, HEADS, HEADS, HEADS), HEADS)


def _at_hand(windows, segment_ids, qs, ks, vs):
    parts = tuple(Part(q, k, v, segment_ids) for q, k, v in zip(qs, ks, vs, strict=True))
    return parts_attention(parts, segment_ids, tuple(Mask(*w) for w in windows))


def _by_halo(windows, segment_ids, qs, ks, vs):
    """Tokens cut over the mesh: each chunk with the tokens before it that its windows reach."""
    segments = split(segment_ids)
    parts, masks = [], []
    for q, k, v, (nearest, window) in zip(qs, ks, vs, windows, strict=True):
        reach = window - 1
        before = -reach % 128 + reach if segments.shape[2] >= 128 else reach  # whole tiles of a TPU

        def extended(x, before=before):
            chunks = split(x)
            return as_rows(jnp.concatenate([halo(chunks, before), chunks], axis=2))

        ids = as_rows(jnp.concatenate([halo_segments(segments, before), segments], axis=2))
        parts.append(Part(as_rows(split(q)), extended(k), extended(v), ids))
        masks.append(Mask(nearest, window, offset=before))
    return join(as_chunks(parts_attention(tuple(parts), as_rows(segments), tuple(masks))))


# A softmax over parts that are at hand ---------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def parts_attention(parts: tuple[Part, ...], segment_ids, masks: tuple[Mask, ...]):
    """One softmax over every part's keys: o [B,T,H,D] in q's dtype; a query that sees nothing gets zeros."""
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
        d = block_backward(p.q, p.k, p.v, segment_ids, p.k_segments, mask, o.astype(lse.dtype), lse, do)
        grads.append(Part(*(x.astype(y.dtype) for x, y in zip(d, p[:3], strict=True)), None))
    return tuple(grads), None


parts_attention.defvjp(_parts_forward, _parts_backward)


# A softmax whose keys come around the ring -------------------------------------------------------------------------


def _next(x):
    """Everything one device on."""
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


@jax.custom_vjp
def ring_attention(q, k, v, segment_ids):
    """Causal attention of a device's two chunks over the whole row; inside `per_device`, in the zig-zag layout.

    Of the keys that come from another device each query chunk sees all or nothing: those of an earlier device
    show their front to all our queries, those of a later one show both chunks to our back. So every step is
    2c x c, whoever we are. The next keys travel while these are used.
    """
    return _ring_forward(q, k, v, segment_ids)[0]


def _from_earlier(step):
    return jax.lax.axis_index(AXIS) >= step


def _ring_forward(q, k, v, segment_ids):
    c = q.shape[1] // 2
    keys = (k, v, segment_ids)
    coming = _next(keys)
    parts = block_forward(q, k, v, segment_ids, segment_ids, CAUSAL)

    def earlier(k, v, segments):
        return block_forward(q, k[:, :c], v[:, :c], segment_ids, segments[:, :c], FULL)

    def later(k, v, segments):
        o, lse = block_forward(q[:, c:], k, v, segment_ids[:, c:], segments, FULL)
        return jnp.pad(o, ((0, 0), (c, 0), (0, 0), (0, 0))), jnp.pad(lse, ((0, 0), (0, 0), (c, 0)), constant_values=EMPTY)

    def step(s, carry):
        keys, parts = carry
        coming = _next(keys)
        return coming, merge(parts, jax.lax.cond(_from_earlier(s), earlier, later, *keys))

    _, (o, lse) = jax.lax.fori_loop(1, jax.lax.axis_size(AXIS), step, (coming, parts))
    o, lse = checkpoint_name((o.astype(q.dtype), lse), SAVED)
    return o, (q, k, v, segment_ids, o, lse)


def _ring_backward(residuals, do):
    q, k, v, segment_ids, o, lse = residuals
    c = q.shape[1] // 2
    o = o.astype(lse.dtype)
    keys = (k, v, segment_ids)
    coming = _next(keys)
    dq, *dkv = block_backward(q, k, v, segment_ids, segment_ids, CAUSAL, o, lse, do)

    def earlier(k, v, segments):
        front = (k[:, :c], v[:, :c], segment_ids, segments[:, :c])
        dq, dk, dv = block_backward(q, *front, FULL, o, lse, do)
        return dq, *(jnp.pad(x, ((0, 0), (0, c), (0, 0), (0, 0))) for x in (dk, dv))

    def later(k, v, segments):
        back = (segment_ids[:, c:], segments, FULL, o[:, c:], lse[:, :, c:], do[:, c:])
        dq, dk, dv = block_backward(q[:, c:], k, v, *back)
        return jnp.pad(dq, ((0, 0), (c, 0), (0, 0), (0, 0))), dk, dv

    def step(s, carry):
        keys, dkv, dq = carry
        coming, dkv = _next(keys), _next(tuple(dkv))  # the keys' gradients travel with them
        more, *own = jax.lax.cond(_from_earlier(s), earlier, later, *keys)
        return coming, tuple(map(jnp.add, dkv, own)), dq + more

    _, dkv, dq = jax.lax.fori_loop(1, jax.lax.axis_size(AXIS), step, (coming, tuple(dkv), dq))
    dk, dv = _next(dkv)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attention.defvjp(_ring_forward, _ring_backward)
