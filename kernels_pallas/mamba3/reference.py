"""Mamba-3's recurrence, token by token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.contract import Mamba3State
from kernels_pallas.linear_attention.reference import scan_tokens
from kernels_pallas.mamba3.rotation import rotate, within_turn


def mamba3_update(
    halves: bool,
    q: jax.Array,  # [B, R, H, K]
    k: jax.Array,  # [B, R, H, K]
    v: jax.Array,  # [B, R, H, V]
    log_decay: jax.Array,  # [B, H]
    dt: jax.Array,  # [B, H]
    mix: jax.Array,  # [B, H]
    turn: jax.Array,  # [B, H, A]
    state: Mamba3State,
) -> tuple[jax.Array, Mamba3State]:
    """Returns (o [B, R, H, V], the state) after one token."""
    angle = within_turn(state.angle + turn)
    q, k = (rotate(x, angle[:, None], halves) for x in (q, k))
    before = jnp.einsum("brhk,brhv->bhkv", state.k, state.v, precision="highest")
    now = jnp.einsum("brhk,brhv->bhkv", k, v, precision="highest")
    S = jnp.exp(log_decay)[..., None, None] * (state.S + ((1 - mix) * dt)[..., None, None] * before)
    S = S + (mix * dt)[..., None, None] * now
    return jnp.einsum("brhk,bhkv->brhv", q, S, precision="highest"), Mamba3State(angle, S, k, v)


def mamba3_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    dt: jax.Array,
    mix: jax.Array,
    turn: jax.Array,
    state: Mamba3State,
    segments: jax.Array | None,
    chunk_size: int | None,
    halves: bool,
) -> tuple[jax.Array, Mamba3State]:
    """The `reference` implementation of `mamba3`; see `kernels_pallas.contract`."""
    del chunk_size
    arrays = [x.astype(state.S.dtype) for x in (q, k, v, log_decay, dt, mix, turn)]
    o, state = scan_tokens(functools.partial(mamba3_update, halves), arrays, segments, state)
    return o.astype(v.dtype), state
