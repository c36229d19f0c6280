"""Next-token cross-entropy that never holds the logits of all tokens: tile by tile, the vocabulary cut over `tensor`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.sharding import TOKENS, axis_size, per_device
from kernels_pallas.operands import pad_axis

TILE = 2048  # tokens of a device whose logits exist at a time


def cross_entropy(hidden, kernel, targets):
    """-log softmax(hidden kernel)[target] of every token, in nats, float32; softmax in float32.

    Args:
      hidden: [B, T, hidden] in the compute dtype.
      kernel: [hidden, vocab].
      targets: [B, T] int.

    Returns:
      [B, T].
    """
    axis = vocabulary_axis()
    arrays = (hidden, kernel.astype(hidden.dtype), targets)

    def local(hidden, kernel, targets):
        return _tiles(hidden, kernel, targets, axis)

    return per_device(local, arrays, (TOKENS, (None, "vocab"), TOKENS), TOKENS)


def vocabulary_axis() -> str | None:
    """The mesh axis that cuts the vocabulary, if any does."""
    return "tensor" if axis_size("tensor") > 1 else None


def sum_over(axis: str | None, x):
    return x if axis is None else jax.lax.psum(x, axis)


def in_tiles(x, tile):
    """[tokens, ...] -> [tiles, tile, ...], padded with zeros."""
    x = pad_axis(x, 0, tile)
    return x.reshape(-1, tile, *x.shape[1:])


def flat(x, shape):
    """The inverse of `in_tiles`, in `shape`."""
    return x.reshape(-1, *x.shape[2:])[: shape[0] * shape[1]].reshape(shape)


def _logits(hidden, kernel, targets, axis):
    """Logits of a tile [tokens, vocab / devices], and each target's place among them where it is here."""
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    here = targets if axis is None else targets - jax.lax.axis_index(axis) * kernel.shape[1]
    return logits, here[:, None] == jnp.arange(kernel.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiles(hidden, kernel, targets, axis):
    return _forward(hidden, kernel, targets, axis)[0]


def _forward(hidden, kernel, targets, axis):
    tile = min(TILE, targets.size)

    def step(_, tiles):
        hidden, targets = tiles
        logits, wanted = _logits(hidden, kernel, targets, axis)
        top = jnp.max(logits, axis=-1)
        top = top if axis is None else jax.lax.pmax(top, axis)
        lse = top + jnp.log(sum_over(axis, jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)))
        return None, (lse - sum_over(axis, jnp.sum(jnp.where(wanted, logits, 0), axis=-1)), lse)

    tiles = (in_tiles(hidden.reshape(-1, hidden.shape[-1]), tile), in_tiles(targets.reshape(-1), tile))
    losses, lse = jax.lax.scan(step, None, tiles)[1]
    return flat(losses, targets.shape), (hidden, kernel, targets, lse)


def _backward(axis, residuals, dlosses):
    """softmax - target, tile by tile; the kernel's gradient is summed over the tiles in float32."""
    hidden, kernel, targets, lse = residuals
    dlosses = sum_over(axis, dlosses)  # the same on every device of the axis, each with its share of their cotangent
    tile = lse.shape[1]

    def step(dkernel, tiles):
        hidden, targets, lse, d = tiles
        logits, wanted = _logits(hidden, kernel, targets, axis)
        dlogits = ((jnp.exp(logits - lse[:, None]) - wanted) * d[:, None]).astype(hidden.dtype)
        more = jnp.matmul(hidden.T, dlogits, preferred_element_type=jnp.float32)
        return dkernel + more, jnp.matmul(dlogits, kernel.T)

    rows = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    tiles = (*(in_tiles(x, tile) for x in rows), lse, in_tiles(dlosses.reshape(-1), tile))
    dkernel, dhidden = jax.lax.scan(step, jnp.zeros(kernel.shape, jnp.float32), tiles)
    return flat(dhidden, hidden.shape), dkernel.astype(kernel.dtype), None


_tiles.defvjp(_forward, _backward)
