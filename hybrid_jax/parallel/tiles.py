"""Losses and top-k tokens from logits that are computed one tile of tokens at a time, never all at once.

A scan over tiles of tokens computes the logits; the backward pass of a loss computes a tile's again and sums the gradient of
the head in float32. The vocabulary may be sharded over the mesh axis `tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.head import Head, as_head
from hybrid_jax.parallel.sharding import TOKENS, mesh_axes_of, shard_map_by_axes
from kernels_pallas.arguments import accumulator, alike
from kernels_pallas.operands import pad_axis

TILE = 2048  # tokens per device whose logits exist at a time
HEAD = ("embed", "vocab")  # the axes of a head's kernel; a bias has the second


class Vocabulary:
    """A device's view of the vocabulary: all of it, or one shard over the mesh axis `tensor`.

    It is made outside of `shard_map_by_axes`, where the mesh is known, and used inside.
    """

    def __init__(self):
        self.axis, self.fsdp = mesh_axes_of("vocab") or None, mesh_axes_of("embed")

    def gather(self, kernel: jax.Array) -> jax.Array:
        """All-gathers a kernel over its FSDP axes: [local hidden, local vocab] -> [hidden, local vocab]; a bias stays as it is.

        The gradient is reduce-scattered.
        """
        return jax.lax.all_gather(kernel, self.fsdp, axis=0, tiled=True) if self.fsdp and kernel.ndim == 2 else kernel

    def sum(self, x: jax.Array) -> jax.Array:
        """Returns x, of any shape, summed over the shards of the vocabulary."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the maximum of x, element by element, over the shards of the vocabulary."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def local(self, ids: jax.Array, size: int) -> jax.Array:
        """Converts global token ids to indices in this device's shard; outside [0, size) for other devices' tokens."""
        return ids if self.axis is None else ids - jax.lax.axis_index(self.axis) * size

    def log_sum_exp(self, logits: jax.Array) -> jax.Array:
        """Returns the log-sum-exp [tokens, 1] over the complete vocabulary of logits [tokens, local vocab]."""
        top = self.max(jnp.max(logits, axis=-1, keepdims=True))
        return top + jnp.log(self.sum(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)))


def _in_tiles(x: jax.Array) -> jax.Array:
    """Reshapes [B, T, ...] to [tiles, tile, ...], padded with zeros."""
    x = x.reshape(-1, *x.shape[2:])
    tile = min(TILE, len(x))
    return pad_axis(x, 0, tile).reshape(-1, tile, *x.shape[1:])


def _flat(x: jax.Array, like: jax.Array) -> jax.Array:
    """Inverts `_in_tiles`: [tiles, tile, ...] -> [B, T, ...], where B and T are those of `like` [B, T, ...]."""
    B, T = like.shape[:2]
    return x.reshape(-1, *x.shape[2:])[: B * T].reshape(B, T, *x.shape[2:])


def loss_of_logits(
    value: Callable[..., tuple[jax.Array, Any]],
    slope: Callable[..., jax.Array],
    hidden: jax.Array,
    head: Head | jax.Array,
    tokens: Sequence[jax.Array] = (),
    constants: Sequence[jax.Array] = (),
) -> jax.Array:
    """Returns the loss of every token from its logits; gradients go to `hidden` and to the head's arrays.

    Args:
      value: (vocabulary, logits [tile, local vocab], tokens, constants) -> (losses [tile] float32, what `slope` needs
        of the forward pass: arrays [tile, ...] that do not grow with the vocabulary).
      slope: (vocabulary, logits, kept, tokens, constants) -> d value / d logits, [tile, local vocab].
      hidden: [B, T, hidden].
      head: the model's head, or the kernel [hidden, vocab] of a plain one.
      tokens: arrays [B, T, ...]; `value` and `slope` receive the tile's, [tile, ...].
      constants: arrays [hidden, vocab] or [vocab]; they receive the device's shard, [hidden, local vocab] or [local vocab].

    Returns:
      [B, T] float32.
    """
    vocabulary, head = Vocabulary(), as_head(head)

    def forward(hidden, arrays, tokens, constants):
        def step(_, tile):
            hidden, tokens = tile
            return None, value(vocabulary, head.with_arrays(*arrays)(hidden), tokens, constants)

        _, (losses, kept) = jax.lax.scan(step, None, jax.tree.map(_in_tiles, (hidden, tokens)))
        return _flat(losses, hidden), (hidden, arrays, tokens, constants, kept)

    def backward(residuals, slopes):
        hidden, arrays, tokens, constants, kept = residuals
        slopes = vocabulary.sum(slopes)  # the same on every device of the axis, each with its share of the cotangent
        dtype = accumulator(hidden)

        def step(gradients, tile):
            hidden, tokens, outer, kept = tile
            logits = head.with_arrays(*arrays)(hidden)
            dproducts = slope(vocabulary, logits, kept, tokens, constants) * head.derivative(logits) * outer[:, None]
            dbias = jnp.sum(dproducts, axis=0, dtype=dtype)
            dproducts = dproducts.astype(hidden.dtype)
            more = (jnp.matmul(hidden.T, dproducts, preferred_element_type=dtype), dbias)
            return tuple(x + y for x, y in zip(gradients, more, strict=False)), jnp.matmul(dproducts, arrays[0].T)

        tiles = (*jax.tree.map(_in_tiles, (hidden, tokens, slopes)), kept)
        start, _ = alike("loss_of_logits", tuple(jnp.zeros(x.shape, dtype) for x in arrays), arrays)
        gradients, dhidden = jax.lax.scan(step, start, tiles)
        return _flat(dhidden, hidden), tuple(x.astype(y.dtype) for x, y in zip(gradients, arrays, strict=True)), None, None

    losses = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    losses.defvjp(forward, backward)

    arrays = head.arrays(hidden.dtype)

    def local(hidden, *others):
        tokens_, others = others[: len(tokens)], tuple(map(vocabulary.gather, others[len(tokens) :]))
        return losses(*alike("loss_of_logits", hidden, others[: len(arrays)], tokens_, others[len(arrays) :]))

    axes = (TOKENS, *[TOKENS] * len(tokens), *_axes(arrays), *_axes(constants))
    return shard_map_by_axes(local, (hidden, *tokens, *arrays, *constants), axes, TOKENS)


def _axes(arrays: Sequence[jax.Array]) -> list[tuple[str, ...]]:
    """Returns the axes of kernels [hidden, vocab] and biases [vocab]."""
    return [HEAD[-x.ndim :] for x in arrays]


def top_k_tokens(hidden: jax.Array, head: Head | jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the top-k next tokens of every token, the most likely first.

    Args:
      hidden: [B, T, hidden].
      head: the model's head, or the kernel [hidden, vocab] of a plain one.
      k: at most vocab.

    Returns:
      (ids int32, log-probabilities float32), [B, T, k] each.
    """
    vocabulary, head = Vocabulary(), as_head(head)

    def local(hidden, *arrays):
        arrays = tuple(map(vocabulary.gather, arrays))
        size = arrays[0].shape[1]

        def step(_, hidden):
            logits = head.with_arrays(*arrays)(hidden)
            found, ids = jax.lax.top_k(logits, min(k, size))
            if vocabulary.axis is not None:  # the best of every shard's best
                ids = ids + jax.lax.axis_index(vocabulary.axis) * size
                found, ids = (jax.lax.all_gather(x, vocabulary.axis, axis=1, tiled=True) for x in (found, ids))
                found, at = jax.lax.top_k(found, k)
                ids = jnp.take_along_axis(ids, at, axis=1)
            return None, (ids, found - vocabulary.log_sum_exp(logits))

        _, (ids, found) = jax.lax.scan(step, None, _in_tiles(hidden))
        return _flat(ids, hidden), _flat(found, hidden)

    arrays = head.arrays(hidden.dtype)
    return shard_map_by_axes(local, (hidden, *arrays), (TOKENS, *_axes(arrays)), (TOKENS, TOKENS))
