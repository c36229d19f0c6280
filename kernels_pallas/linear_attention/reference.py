"""The recurrence, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def linear_attention_update(
    q: jax.Array,  # [B, H, K]
    k: jax.Array,  # [B, H, K]
    v: jax.Array,  # [B, H, V]
    g: jax.Array,  # [B, H]
    S: jax.Array,  # [B, H, K, V]
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, H, V], S) after one token: S <- e^g S + k v', o = scale q'S."""
    S = jnp.exp(g)[..., None, None] * S + k[..., :, None] * v[..., None, :]
    return scale * jnp.einsum("bhk,bhkv->bhv", q, S, precision="highest"), S


def scan_tokens(
    update: Callable[..., tuple[jax.Array, Any]], arrays: Sequence[jax.Array], segments: jax.Array | None, state: Any
) -> tuple[jax.Array, Any]:
    """Runs `update(*tokens, state) -> (o, state)` over time, resetting the state where a segment begins.

    Args:
      arrays: each [B, T, ...].
      segments: [B, T] segment numbers, 0 first; None: one segment.
      state: a pytree of [B, ...].

    Returns:
      The outputs [B, T, ...], and the final state.
    """
    B, T = arrays[0].shape[:2]
    begins = jnp.zeros((B, T), bool) if segments is None else jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))

    def step(state, token):
        begin, *xs = token
        state = jax.tree.map(lambda s: jnp.where(begin.reshape(-1, *(1,) * (s.ndim - 1)), 0, s), state)
        o, state = update(*xs, state)
        return state, o

    state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (begins, *arrays)))
    return jnp.moveaxis(o, 0, 1), state


def linear_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The `reference` implementation of `linear_attention`; see `kernels_pallas.contract`."""
    del chunk_size
    arrays = [x.astype(state.dtype) for x in (q, k, v, log_decay)]
    o, state = scan_tokens(lambda q, k, v, g, S: linear_attention_update(q, k, v, g, S, scale), arrays, segments, state)
    return o.astype(v.dtype), state
