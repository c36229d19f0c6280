"""Next-token cross-entropy that never holds the logits of all tokens: tile by tile, the vocabulary cut over `tensor`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.sharding import context_mesh, per_device

TILE = 2048  # tokens of a device whose logits exist at a time
TOKENS = ("batch", "sequence")


def cross_entropy(hidden, kernel, targets):
    """-log softmax(hidden kernel)[target] of every token, in nats, float32; softmax in float32.

    Args:
      hidden: [B, T, hidden] in the compute dtype.
      kernel: [hidden, vocab].
      targets: [B, T] int.

    Returns:
      [B, T].
    """
    mesh = context_mesh()
    cut = mesh is not None and mesh.shape.get("tensor", 1) > 1
    arrays = (hidden, kernel.astype(hidden.dtype), targets)

    def local(hidden, kernel, targets):
        return _tiles(hidden, kernel, targets, "tensor" if cut else None)

    return per_device(local, arrays, ((*TOKENS, None), (None, "vocab"), TOKENS), TOKENS)


def _tiles(hidden, kernel, targets, axis):
    shape = targets.shape
    tokens = targets.size
    tile = min(TILE, tokens)
    hidden, targets = hidden.reshape(tokens, -1), targets.reshape(tokens)
    if tile == tokens:
        return _losses(hidden, kernel, targets, axis).reshape(shape)
    pad = -tokens % tile
    hidden, targets = jnp.pad(hidden, ((0, pad), (0, 0))), jnp.pad(targets, (0, pad))

    @jax.checkpoint
    def step(carry, tile):
        return carry, _losses(tile[0], kernel, tile[1], axis)

    tiles = (hidden.reshape(-1, tile, hidden.shape[-1]), targets.reshape(-1, tile))
    return jax.lax.scan(step, None, tiles)[1].reshape(-1)[:tokens].reshape(shape)


def _losses(hidden, kernel, targets, axis):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    if axis is None:
        wanted = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)) - wanted
    top = jax.lax.pmax(top, axis)
    here = targets - jax.lax.axis_index(axis) * kernel.shape[1]
    mine = (here >= 0) & (here < kernel.shape[1])
    wanted = jnp.take_along_axis(logits, jnp.clip(here, 0, kernel.shape[1] - 1)[:, None], axis=-1)[:, 0]
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), axis)
    return top + jnp.log(total) - jax.lax.psum(jnp.where(mine, wanted, 0), axis)
