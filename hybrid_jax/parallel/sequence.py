"""Tokens of a row over the mesh axis `seq`: the zig-zag layout and what passes between its chunks.

A row is cut in 2N chunks for N devices; device i holds chunk i (its front) and chunk 2N-1-i (its back), so that
causal attention costs every device the same. The data pipeline makes the layout (`to_zigzag`). Inside
`shard_map_by_axes` a device sees [B, 2c, ...]; here its chunks are stacked, [2, B, c, ...].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SEQ_AXIS = "seq"


def positions_of(segment_ids):
    """[B,T] positions that restart at 0 where the segment id changes; in order of time, numpy or JAX."""
    T = segment_ids.shape[1]
    if isinstance(segment_ids, np.ndarray):
        xp, accumulate = np, np.maximum.accumulate
    else:
        xp, accumulate = jnp, jax.lax.cummax
    index = xp.broadcast_to(xp.arange(T, dtype=xp.int32), segment_ids.shape)
    begins = xp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - accumulate(xp.where(begins, index, 0), axis=1)


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """[length] which token stands at each place of the layout.

    Raises:
      ValueError: 2 * devices does not divide the length.
    """
    if devices == 1:
        return np.arange(length)
    if length % (2 * devices):
        raise ValueError(f"a row of {length} tokens can not be cut in {2 * devices} chunks for mesh axis 'seq' of size {devices}")
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]].reshape(-1) for i in range(devices)])


def to_zigzag(x, devices: int, axis: int = 1):
    """An array in order of time -> in the layout."""
    return x if devices == 1 else x.take(zigzag_order(x.shape[axis], devices), axis=axis)


def from_zigzag(x, devices: int, axis: int = 1):
    """The inverse of `to_zigzag`."""
    return x if devices == 1 else x.take(np.argsort(zigzag_order(x.shape[axis], devices)), axis=axis)


def to_pair(x: jax.Array) -> jax.Array:
    """A device's [B, 2c, ...] -> its chunks [2, B, c, ...]."""
    return jnp.stack(jnp.split(x, 2, axis=1))


def from_pair(x: jax.Array) -> jax.Array:
    """The inverse of `to_pair`."""
    return jnp.concatenate([x[0], x[1]], axis=1)


def as_rows(x: jax.Array) -> jax.Array:
    """Chunks [2, B, ...] -> [2B, ...], as so many rows of a batch."""
    return x.reshape(-1, *x.shape[2:])


def as_chunks(x: jax.Array) -> jax.Array:
    """The inverse of `as_rows`."""
    return x.reshape(2, -1, *x.shape[1:])


def shift(x: jax.Array, distance: int) -> jax.Array:
    """Chunk j of the row takes what chunk j - distance has; zeros where there is none. x [2, ...]."""
    n = jax.lax.axis_size(SEQ_AXIS)
    send = {
        "front": [(i, i + distance) for i in range(n - distance)],
        "back": [(i, i - distance) for i in range(distance, n)],
        "over": [(i, 2 * n - 1 - i - distance) for i in range(n) if n <= i + distance < 2 * n],
    }

    def moved(x, pairs):
        return jax.lax.ppermute(x, SEQ_AXIS, pairs) if pairs else jnp.zeros_like(x)

    return jnp.stack([moved(x[0], send["front"]), moved(x[1], send["back"]) + moved(x[0], send["over"])])


def halo(x: jax.Array, length: int) -> jax.Array:
    """The `length` tokens before each chunk, [2, B, length, ...]; zeros before the row's first. x [2, B, c, ...]."""
    c, parts, hop = x.shape[2], [], 1
    while length > 0:
        take = min(c, length)
        parts.append(shift(x[:, :, c - take :], hop))
        length, hop = length - take, hop + 1
    return jnp.concatenate([*reversed(parts), x[:, :, :0]], axis=2)


def halo_segments(segment_ids: jax.Array, length: int) -> jax.Array:
    """`halo` of segment ids, -1 before the row's first token."""
    return halo(segment_ids + 1, length) - 1


def continued(segment_ids: jax.Array) -> jax.Array:
    """[2, B] whether each chunk goes on with the segment that ends the one before it."""
    return halo_segments(segment_ids, 1)[:, :, 0] == segment_ids[:, :, 0]


def exclusive_scan(first, then: Callable):
    """For each chunk the maps of all chunks before it, composed: `then(earlier, later)` of pytrees [2, ...].

    All-zero stands for "nothing before": composed with it, an affine map must keep its constant alone. The
    depth is log2 of the number of chunks, plus the step to the next one.
    """
    maps, distance = first, 1
    chunks = 2 * jax.lax.axis_size(SEQ_AXIS)
    while distance < chunks:
        earlier = jax.tree.map(lambda x, d=distance: shift(x, d), maps)
        maps = then(earlier, maps)
        distance *= 2
    return jax.tree.map(lambda x: shift(x, 1), maps)
