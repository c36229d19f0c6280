"""Merging the keys and values of chunks."""

from __future__ import annotations

import jax.numpy as jnp

from hybrid_jax.composition.states import Read
from hybrid_jax.layers.attention import KVCache


def _last_window(read: Read) -> KVCache:
    """Returns the windows of the last chunks, with as many slots as the empty cache has; empty ones stand first."""
    last = read.groups[-1]
    of_last = [x[last.count - 1 :: last.count] for x in last.state[:4]]
    room = read.empty.k.shape[1] - of_last[0].shape[1]
    arrays = [jnp.concatenate([e[:, :room], x], axis=1) for e, x in zip(read.empty[:4], of_last, strict=True)]
    return KVCache._make([*arrays, last.state.next_slot])


def composed_keys(read: Read, how: str, *, windowed: bool) -> KVCache:
    """Returns one cache, [B, slots, ...], of the caches that attention has of contexts.

    Args:
      how: `full`, `concat` or `sw`.
      windowed: whether the caches are of a window, newest token last.
    """
    if how == "full":
        return read.ordinary
    if windowed:
        return _last_window(read)
    P = read.prefix.shape[1]
    pieces = [[x[:, :P] for x in read.before[:4]]]
    for g in read.groups if how == "concat" else read.groups[-1:]:
        T, first = g.inputs.shape[1], 0 if how == "concat" else g.count - 1
        chunks = [x[:, P : P + T].reshape(-1, g.count, *x[:, P : P + T].shape[1:])[:, first:] for x in g.state[:4]]
        pieces.append([x.reshape(len(x), -1, *x.shape[3:]) for x in chunks])
    arrays = [jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)]
    tokens = arrays[0].shape[1]
    padded = [jnp.concatenate([x, e[:, tokens:]], axis=1) for x, e in zip(arrays, read.empty[:4], strict=True)]
    return KVCache._make([*padded, jnp.asarray(tokens, jnp.int32)])
