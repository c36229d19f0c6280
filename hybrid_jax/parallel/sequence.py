"""The tokens of a row over the mesh axis `seq`: the zig-zag order and what passes between its chunks.

A row is split into 2N chunks for N devices; device i holds chunk i (its front) and chunk 2N-1-i (its back), so that
causal attention costs every device the same. The data pipeline makes the order (`to_zigzag`). Inside
`shard_map_by_axes` a device has [B, 2c, ...]; in this module its two chunks are stacked, [2, B, c, ...].

    N = 2    device 0: chunks 0 | 3    device 1: chunks 1 | 2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEQ_AXIS = "seq"


def positions_of(segment_ids: Any) -> Any:
    """Returns positions [B, T] that restart at 0 where the segment id changes, for tokens in order of time; numpy or JAX."""
    T = segment_ids.shape[1]
    if isinstance(segment_ids, np.ndarray):
        xp, accumulate = np, np.maximum.accumulate
    else:
        xp, accumulate = jnp, jax.lax.cummax
    index = xp.broadcast_to(xp.arange(T, dtype=xp.int32), segment_ids.shape)
    begins = xp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - accumulate(xp.where(begins, index, 0), axis=1)


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """Returns, for each place of the zig-zag order, the index of the token there, [length].

    Raises:
      ValueError: 2 * devices does not divide the length.
    """
    if devices == 1:
        return np.arange(length)
    if length % (2 * devices):
        raise ValueError(
            f"a row of {length} tokens cannot be split into {2 * devices} chunks for mesh axis 'seq' of size {devices}"
        )
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]].reshape(-1) for i in range(devices)])


def to_zigzag(x: Any, devices: int, axis: int = 1) -> Any:
    """Reorders an array from order of time to zig-zag order along `axis`."""
    return x if devices == 1 else x.take(zigzag_order(x.shape[axis], devices), axis=axis)


def from_zigzag(x: Any, devices: int, axis: int = 1) -> Any:
    """Inverts `to_zigzag`."""
    return x if devices == 1 else x.take(np.argsort(zigzag_order(x.shape[axis], devices)), axis=axis)


def to_pair(x: jax.Array) -> jax.Array:
    """Reshapes a device's [B, 2c, ...] to its pair of chunks [2, B, c, ...]."""
    return jnp.swapaxes(x.reshape(len(x), 2, -1, *x.shape[2:]), 0, 1)


def from_pair(x: jax.Array) -> jax.Array:
    """Inverts `to_pair`."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def as_rows(x: jax.Array) -> jax.Array:
    """Reshapes chunks [2, B, ...] to [2B, ...], as rows of a batch."""
    return x.reshape(-1, *x.shape[2:])


def as_chunks(x: jax.Array) -> jax.Array:
    """Inverts `as_rows`."""
    return x.reshape(2, -1, *x.shape[1:])


def shift(x: jax.Array, distance: int) -> jax.Array:
    """Returns for chunk j of the row what chunk j - distance has; zeros where there is no such chunk.

    Chunks 0 ... N-1 are the fronts of devices 0 ... N-1, chunks N ... 2N-1 the backs of devices N-1 ... 0. So a front goes to the
    front of device i + distance, a back to the back of device i - distance, and a front that would pass device N-1 to the back
    of device 2N-1 - (i + distance). A negative distance sends the same ways back.

    Args:
      x: [2, ...] the device's pair of chunks.
      distance: not 0; negative: from later chunks.
    """
    n, hops = jax.lax.axis_size(SEQ_AXIS), abs(distance)
    ways = {
        "front": [(i, i + hops) for i in range(n - hops)],
        "back": [(i, i - hops) for i in range(hops, n)],
        "over": [(i, 2 * n - 1 - i - hops) for i in range(n) if n <= i + hops < 2 * n],
    }

    def moved(chunk, way):
        pairs = ways[way] if distance > 0 else [(there, here) for here, there in ways[way]]
        return jax.lax.ppermute(chunk, SEQ_AXIS, pairs) if pairs else jnp.zeros_like(chunk)

    front, back = moved(x[0], "front"), moved(x[1], "back")
    return jnp.stack([front, back + moved(x[0], "over")] if distance > 0 else [front + moved(x[1], "over"), back])


def halo(x: jax.Array, length: int) -> jax.Array:
    """Returns the `length` tokens before each chunk of x [2, B, c, ...], [2, B, length, ...]; zeros before the first token."""
    c, parts, hop = x.shape[2], [], 1
    while length > 0:
        take = min(c, length)
        parts.append(shift(x[:, :, c - take :], hop))
        length, hop = length - take, hop + 1
    return jnp.concatenate([*reversed(parts), x[:, :, :0]], axis=2)


def halo_segments(segment_ids: jax.Array, length: int) -> jax.Array:
    """Returns `halo` of segment ids [2, B, c], with -1 before the row's first token."""
    return halo(segment_ids + 1, length) - 1


def continued(segment_ids: jax.Array) -> jax.Array:
    """Returns [2, B] whether each chunk begins with the segment that ends the chunk before it."""
    return halo_segments(segment_ids, 1)[:, :, 0] == segment_ids[:, :, 0]


def exclusive_scan(first: Any, then: Callable) -> Any:
    """Returns for each chunk the composition of the maps of all chunks before it, in log2(2N) + 1 shifts.

    Args:
      first: the map of each chunk, a pytree of arrays [2, ...].
      then: (earlier, later) -> their composition. All zeros stand for "nothing before": composed with them, an affine map must
        keep only its constant.
    """
    maps, distance = first, 1
    chunks = 2 * jax.lax.axis_size(SEQ_AXIS)
    while distance < chunks:
        earlier = jax.tree.map(lambda x, d=distance: shift(x, d), maps)
        maps = then(earlier, maps)
        distance *= 2
    return jax.tree.map(lambda x: shift(x, 1), maps)
