"""Losses of logits that never exist for all tokens: tile by tile, the vocabulary cut over `tensor`.

Both passes scan over tiles of tokens; backward makes a tile's logits anew and the head's gradient is summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.sharding import TOKENS, axes_cutting, per_device
from kernels_pallas.operands import pad_axis

TILE = 2048  # tokens of a device whose logits exist at a time
HEAD = ("embed", "vocab")


class Vocabulary:
    """The vocabulary as a device holds it: whole, or its part of the mesh's `tensor` axis."""

    def __init__(self):
        self.axis = axes_cutting("vocab") or None

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

    def in_tiles(x):
        """[B, T, ...] -> [tiles, tile, ...], padded with zeros."""
        x = x.reshape(-1, *x.shape[2:])
        tile = min(TILE, len(x))
        return pad_axis(x, 0, tile).reshape(-1, tile, *x.shape[1:])

    def flat(x, like):
        """The inverse, with the two leading dimensions of `like`."""
        B, T = like.shape[:2]
        return x.reshape(-1, *x.shape[2:])[: B * T].reshape(B, T, *x.shape[2:])

    def forward(hidden, head, tokens, constants):
        def step(_, tile):
            hidden, tokens = tile
            return None, value(vocabulary, logits_of(hidden, head), tokens, constants)

        _, (losses, kept) = jax.lax.scan(step, None, jax.tree.map(in_tiles, (hidden, tokens)))
        return flat(losses, hidden), (hidden, head, tokens, constants, kept)

    def backward(residuals, slopes):
        hidden, head, tokens, constants, kept = residuals
        slopes = vocabulary.sum(slopes)  # the same on every device of the axis, each with its share of the cotangent

        def step(dhead, tile):
            hidden, tokens, outer, kept = tile
            dlogits = slope(vocabulary, logits_of(hidden, head), kept, tokens, constants) * outer[:, None]
            dlogits = dlogits.astype(hidden.dtype)
            return dhead + logits_of(hidden.T, dlogits), jnp.matmul(dlogits, head.T)

        tiles = (*jax.tree.map(in_tiles, (hidden, tokens, slopes)), kept)
        dhead, dhidden = jax.lax.scan(step, jnp.zeros(head.shape, jnp.float32), tiles)
        return flat(dhidden, hidden), dhead.astype(head.dtype), None, None

    losses = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    losses.defvjp(forward, backward)

    cut = axes_cutting("embed")

    def whole(head):
        """Gathered here, so that its gradient is scattered as it is summed."""
        return jax.lax.all_gather(head, cut, axis=0, tiled=True) if cut else head

    def local(hidden, head, *others):
        return losses(hidden, whole(head), others[: len(tokens)], tuple(map(whole, others[len(tokens) :])))

    arrays = (hidden, head.astype(hidden.dtype), *tokens, *constants)
    return per_device(local, arrays, (TOKENS, HEAD, *[TOKENS] * len(tokens), *[HEAD] * len(constants)), TOKENS)
