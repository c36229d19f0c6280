"""Kullback-Leibler divergence from a teacher's next-token distribution, tile by tile like `cross_entropy`.

Neither model's logits exist for more than `TILE` tokens of a device at a time; the vocabulary is cut over `tensor`. Only
the student takes gradients.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.cross_entropy import TILE, flat, in_tiles, sum_over, vocabulary_axis
from hybrid_jax.parallel.sharding import TOKENS, per_device

KINDS = ("forward", "reverse")
KERNEL = (None, "vocab")


def divergence(hidden, kernel, teacher_hidden, teacher_kernel, *, kind: str = "forward", temperature: float = 1.0):
    """KL(teacher | student), or KL(student | teacher) if `reverse`, of every token, in nats, float32.

    Both distributions are softmax(logits / temperature); nothing is multiplied by temperature^2.

    Args:
      hidden, teacher_hidden: [B, T, hidden] final states.
      kernel, teacher_kernel: [hidden, vocab] of the heads; may be the same array.

    Returns:
      [B, T].
    """
    axis = vocabulary_axis()
    arrays = (
        hidden,
        kernel.astype(hidden.dtype),
        *map(jax.lax.stop_gradient, (teacher_hidden, teacher_kernel.astype(hidden.dtype))),
    )

    def local(*arrays):
        return _tiles(*arrays, axis, kind, temperature)

    return per_device(local, arrays, (TOKENS, KERNEL, TOKENS, KERNEL), TOKENS)


def _log_softmax(hidden, kernel, axis, temperature):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32) / temperature
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = top if axis is None else jax.lax.pmax(top, axis)
    return logits - top - jnp.log(sum_over(axis, jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)))


def _of_tile(hidden, kernel, teacher, teacher_kernel, axis, kind, temperature):
    """(student's, teacher's log probabilities, divergence) of a tile's tokens."""
    own = _log_softmax(hidden, kernel, axis, temperature)
    other = _log_softmax(teacher, teacher_kernel, axis, temperature)
    terms = jnp.exp(other) * (other - own) if kind == "forward" else jnp.exp(own) * (own - other)
    return own, other, sum_over(axis, jnp.sum(terms, axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _tiles(hidden, kernel, teacher, teacher_kernel, axis, kind, temperature):
    return _forward(hidden, kernel, teacher, teacher_kernel, axis, kind, temperature)[0]


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _forward(hidden, kernel, teacher, teacher_kernel, axis, kind, temperature):
    tile = min(TILE, hidden.shape[0] * hidden.shape[1])

    def step(_, tiles):
        return None, _of_tile(tiles[0], kernel, tiles[1], teacher_kernel, axis, kind, temperature)[2]

    _, found = jax.lax.scan(step, None, (in_tiles(_rows(hidden), tile), in_tiles(_rows(teacher), tile)))
    return flat(found, hidden.shape[:2]), (hidden, kernel, teacher, teacher_kernel)


def _backward(axis, kind, temperature, residuals, d):
    """d logits: (student - teacher) / temperature, or student * (log student - log teacher - KL) / temperature."""
    hidden, kernel, teacher, teacher_kernel = residuals
    d = sum_over(axis, d)  # the same on every device of the axis, each with its share of the cotangent
    tile = min(TILE, hidden.shape[0] * hidden.shape[1])

    def step(dkernel, tiles):
        hidden, teacher, d = tiles
        own, other, found = _of_tile(hidden, kernel, teacher, teacher_kernel, axis, kind, temperature)
        p = jnp.exp(own)
        dlogits = p - jnp.exp(other) if kind == "forward" else p * (own - other - found[:, None])
        dlogits = (dlogits * (d / temperature)[:, None]).astype(hidden.dtype)
        return dkernel + jnp.matmul(hidden.T, dlogits, preferred_element_type=jnp.float32), jnp.matmul(dlogits, kernel.T)

    tiles = (in_tiles(_rows(hidden), tile), in_tiles(_rows(teacher), tile), in_tiles(d.reshape(-1), tile))
    dkernel, dhidden = jax.lax.scan(step, jnp.zeros(kernel.shape, jnp.float32), tiles)
    return flat(dhidden, hidden.shape), dkernel.astype(kernel.dtype), None, None


_tiles.defvjp(_forward, _backward)


def top_k_divergence(hidden, kernel, ids, log_probabilities):
    """KL(teacher | student) where of the teacher only its k likeliest tokens are known, all others as one event.

    Args:
      hidden, kernel: as in `divergence`.
      ids, log_probabilities: [B, T, k], distinct ids.

    Returns:
      [B, T].
    """
    axis = vocabulary_axis()

    def local(*arrays):
        return _top_k_tiles(*arrays, axis)

    arrays = (hidden, kernel.astype(hidden.dtype), ids, jax.lax.stop_gradient(log_probabilities))
    return per_device(local, arrays, (TOKENS, KERNEL, TOKENS, TOKENS), TOKENS)


REST = 1e-9  # the least probability of all other tokens together


def _of_top_k_tile(hidden, kernel, ids, log_q, axis):
    """(log p [tokens, vocab here], which of it is known, q there, log of the rest's p and q, divergence)."""
    own = _log_softmax(hidden, kernel, axis, 1.0)
    size = kernel.shape[1]
    here = ids if axis is None else ids - jax.lax.axis_index(axis) * size
    inside = (here >= 0) & (here < size)
    place = jnp.where(inside, here, 0)
    log_p = sum_over(axis, jnp.where(inside, jnp.take_along_axis(own, place, axis=-1), 0))
    q = jnp.exp(log_q)
    rest_p, rest_q = (jnp.maximum(1 - jnp.sum(x, axis=-1), REST) for x in (jnp.exp(log_p), q))
    found = jnp.sum(q * (log_q - log_p), axis=-1) + rest_q * (jnp.log(rest_q) - jnp.log(rest_p))
    return own, place, jnp.where(inside, q, 0), inside, rest_p, rest_q, found


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _top_k_tiles(hidden, kernel, ids, log_q, axis):
    return _top_k_forward(hidden, kernel, ids, log_q, axis)[0]


def _top_k_forward(hidden, kernel, ids, log_q, axis):
    tile = min(TILE, hidden.shape[0] * hidden.shape[1])

    def step(_, tiles):
        hidden, ids, log_q = tiles
        return None, _of_top_k_tile(hidden, kernel, ids, log_q, axis)[-1]

    _, found = jax.lax.scan(step, None, tuple(in_tiles(_rows(x), tile) for x in (hidden, ids, log_q)))
    return flat(found, hidden.shape[:2]), (hidden, kernel, ids, log_q)


def _top_k_backward(axis, residuals, d):
    """d logits: p - q of the known tokens, p (1 - rest q / rest p) of all others."""
    hidden, kernel, ids, log_q = residuals
    d = sum_over(axis, d)
    tile = min(TILE, hidden.shape[0] * hidden.shape[1])

    def step(dkernel, tiles):
        hidden, ids, log_q, d = tiles
        own, place, q, inside, rest_p, rest_q, _ = _of_top_k_tile(hidden, kernel, ids, log_q, axis)
        p, row = jnp.exp(own), jnp.arange(len(d))[:, None]
        share = (rest_q / rest_p)[:, None]
        known = jnp.take_along_axis(p, place, axis=-1)
        dlogits = (p * (1 - share)).at[row, place].add(jnp.where(inside, known * share - q, 0))
        dlogits = (dlogits * d[:, None]).astype(hidden.dtype)
        return dkernel + jnp.matmul(hidden.T, dlogits, preferred_element_type=jnp.float32), jnp.matmul(dlogits, kernel.T)

    tiles = (*(in_tiles(_rows(x), tile) for x in (hidden, ids, log_q)), in_tiles(d.reshape(-1), tile))
    dkernel, dhidden = jax.lax.scan(step, jnp.zeros(kernel.shape, jnp.float32), tiles)
    return flat(dhidden, hidden.shape), dkernel.astype(kernel.dtype), None, None


_top_k_tiles.defvjp(_top_k_forward, _top_k_backward)
