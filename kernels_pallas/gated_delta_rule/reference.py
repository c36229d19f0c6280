"""The recurrence, token by token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear_attention.reference import scan_tokens


def gated_delta_rule_update(
    q: jax.Array,  # [B, H, K]
    k: jax.Array,  # [B, H, K]
    v: jax.Array,  # [B, H, V]
    g: jax.Array,  # [B, H]
    beta: jax.Array,  # [B, H]
    S: jax.Array,  # [B, H, K, V]
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, H, V], S) after one token: S <- e^g S; S <- S + beta k (v - S'k)'; o = scale q'S."""
    S = jnp.exp(g)[..., None, None] * S
    error = v - jnp.einsum("bhkv,bhk->bhv", S, k, precision="highest")
    S = S + (beta[..., None] * k)[..., :, None] * error[..., None, :]
    return scale * jnp.einsum("bhk,bhkv->bhv", q, S, precision="highest"), S


def gated_delta_rule_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The `reference` implementation of `gated_delta_rule`; see `kernels_pallas.contract`."""
    del chunk_size
    arrays = [x.astype(state.dtype) for x in (q, k, v, log_decay, beta)]
    o, state = scan_tokens(functools.partial(gated_delta_rule_update, scale=scale), arrays, segments, state)
    return o.astype(v.dtype), state
