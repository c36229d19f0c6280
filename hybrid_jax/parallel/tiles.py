"""Of logits that never exist for all tokens: losses, and the likeliest tokens; the vocabulary is cut over `tensor`.

A scan over tiles of tokens makes them; a loss's backward makes a tile's anew and sums the head's gradient in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.sharding import TOKENS, axes_cutting, shard_map_by_axes
from kernels_pallas.arguments import alike
from kernels_pallas.operands import pad_axis

TILE = 2048  # tokens of a device whose logits exist at a time
HEAD = ("embed", "vocab")


class Vocabulary:
    """The vocabulary as a device holds it: whole, or its part of the mesh's `tensor` axis; made outside of `shard_map_by_axes`."""

    def __init__(self):
        self.axis, self.cut = axes_cutting("vocab") or None, axes_cutting("embed")

    def head(self, part):
        """[hidden, part of the vocabulary] from a device's part of `hidden` too; its gradient is scattered as it is summed."""
        return jax.lax.all_gather(part, self.cut, axis=0, tiled=True) if self.cut else part

    def sum(self, x):
        """x over the devices that hold the vocabulary's parts."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def max(self, x):
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def local(self, ids, size: int):
        """Places of token ids in this device's part, which has `size`; beyond it where they are not here."""
        return ids if self.axis is None else ids - jax.lax.axis_index(self.axis) * size

    def log_sum_exp(self, logits):
        """[tokens, part of the vocabulary] -> [tokens, 1], over all of it."""
        top = self.max(jnp.max(logits, axis=-1, keepdims=True))
        return top + jnp.log(self.sum(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)))


def logits_of(hidden, head):
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def _in_tiles(x):
    """[B, T, ...] -> [tiles, tile, ...], padded with zeros."""
    x = x.reshape(-1, *x.shape[2:])
    tile = min(TILE, len(x))
    return pad_axis(x, 0, tile).reshape(-1, tile, *x.shape[1:])


def _flat(x, like):
    """The inverse, with the two leading dimensions of `like`."""
    B, T = like.shape[:2]
    return x.reshape(-1, *x.shape[2:])[: B * T].reshape(B, T, *x.shape[2:])


def loss_of_logits(value: Callable, slope: Callable, hidden, head, tokens: Sequence = (), constants: Sequence = ()):
    """The loss of every token whose logits are `hidden head`; gradients go to these two.

    Args:
      value: (vocabulary, logits [tile, part of the vocabulary], tokens, constants) -> ([tile] float32, what `slope` wants
        kept of it: arrays [tile, ...] that do not grow with the vocabulary).
      slope: (vocabulary, logits, kept, tokens, constants) -> d value / d logits, as large as they.
      hidden: [B, T, hidden].
      head: [hidden, vocab].
      tokens: arrays [B, T, ...] of which `value` and `slope` get the tile's.
      constants: arrays [hidden, vocab] of which they get the device's part.

    Returns:
      [B, T] float32.
    """
    vocabulary = Vocabulary()

    def forward(hidden, head, tokens, constants):
        def step(_, tile):
            hidden, tokens = tile
            return None, value(vocabulary, logits_of(hidden, head), tokens, constants)

        _, (losses, kept) = jax.lax.scan(step, None, jax.tree.map(_in_tiles, (hidden, tokens)))
        return _flat(losses, hidden), (hidden, head, tokens, constants, kept)

    def backward(residuals, slopes):
        hidden, head, tokens, constants, kept = residuals
        slopes = vocabulary.sum(slopes)  # the same on every device of the axis, each with its share of the cotangent

        def step(dhead, tile):
            hidden, tokens, outer, kept = tile
            dlogits = slope(vocabulary, logits_of(hidden, head), kept, tokens, constants) * outer[:, None]
            dlogits = dlogits.astype(hidden.dtype)
            return dhead + logits_of(hidden.T, dlogits), jnp.matmul(dlogits, head.T)

        tiles = (*jax.tree.map(_in_tiles, (hidden, tokens, slopes)), kept)
        start, _ = alike("loss_of_logits", jnp.zeros(head.shape, jnp.float32), head)
        dhead, dhidden = jax.lax.scan(step, start, tiles)
        return _flat(dhidden, hidden), dhead.astype(head.dtype), None, None

    losses = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    losses.defvjp(forward, backward)

    def local(hidden, head, *others):
        constants = tuple(map(vocabulary.head, others[len(tokens) :]))
        return losses(*alike("loss_of_logits", hidden, vocabulary.head(head), others[: len(tokens)], constants))

    arrays = (hidden, head.astype(hidden.dtype), *tokens, *constants)
    return shard_map_by_axes(local, arrays, (TOKENS, HEAD, *[TOKENS] * len(tokens), *[HEAD] * len(constants)), TOKENS)


def top_k_tokens(hidden, head, k: int):
    """The k likeliest next tokens of every token, the best first.

    Args:
      hidden: [B, T, hidden].
      head: [hidden, vocab]; k is at most vocab.

    Returns:
      (ids int32, log-probabilities float32), [B, T, k] each.
    """
    vocabulary = Vocabulary()

    def local(hidden, head):
        head = vocabulary.head(head)
        size = head.shape[1]

        def step(_, hidden):
            logits = logits_of(hidden, head)
            found, ids = jax.lax.top_k(logits, min(k, size))
            if vocabulary.axis is not None:  # the best of the parts' best
                ids = ids + jax.lax.axis_index(vocabulary.axis) * size
                found, ids = (jax.lax.all_gather(x, vocabulary.axis, axis=1, tiled=True) for x in (found, ids))
                found, at = jax.lax.top_k(found, k)
                ids = jnp.take_along_axis(ids, at, axis=1)
            return None, (ids, found - vocabulary.log_sum_exp(logits))

        _, tiles = jax.lax.scan(step, None, _in_tiles(hidden))
        return tuple(_flat(x, hidden) for x in tiles)

    return shard_map_by_axes(local, (hidden, head.astype(hidden.dtype)), (TOKENS, HEAD), (TOKENS, TOKENS))
