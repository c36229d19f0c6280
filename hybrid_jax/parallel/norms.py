"""Norms of activations on a mesh: every token, and for norms of heads every head, by itself on the device that has it."""

from __future__ import annotations

import functools

import jax

from hybrid_jax.parallel.sharding import TOKENS, shard_map_by_axes
from kernels_pallas import gated_rms_norm, rms_norm

_HEADS = (*TOKENS, "heads")


def gated_norm(o: jax.Array, gate: jax.Array, weight: jax.Array, eps: float, *, gate_first: bool = False) -> jax.Array:
    """Returns `gated_rms_norm` of o and gate [B, T, H, D], however they are sharded; weight is [D] or [H, D]."""
    local = functools.partial(gated_rms_norm, eps=eps, gate_first=gate_first)
    return shard_map_by_axes(local, (o, gate, weight), (_HEADS, _HEADS, ("heads",) if weight.ndim == 2 else (None,)), _HEADS)


def hidden_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns `rms_norm` of x [B, T, hidden] by weight [hidden]; tokens may be sharded, channels are not."""
    return shard_map_by_axes(functools.partial(rms_norm, eps=eps), (x, weight), (TOKENS, (None,)), TOKENS)
