"""Shared by the tests of parallelism: random arrays, and attention by its definition."""

import jax
import jax.numpy as jnp
import numpy as np


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def segments_of(B, T):
    return jnp.asarray(np.cumsum(np.random.default_rng(0).random((B, T)) < 0.2, axis=1), jnp.int32)


def plain_attention(q, k, v, segments, nearest, window, soft_cap=None):
    """By the definition, every score at once."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, G, axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    seen = (distance >= nearest) & (distance < (window or T)) & (segments[:, :, None] == segments[:, None, :])[:, None]
    p = jnp.where(seen, jnp.exp(s - s.max(-1, keepdims=True)), 0)
    p = p / jnp.where(seen.any(-1, keepdims=True), p.sum(-1, keepdims=True), 1)
    return jnp.einsum("bhts,bshd->bthd", p, v)
