"""Norms of activations on a mesh: every token, and for norms of heads every head, by itself on the device that has it."""

from __future__ import annotations

import functools

import jax

from hybrid_jax.parallel.sharding import TOKENS, divides_heads, shard_map_by_axes
from kernels_pallas import gated_rms_norm, qk_norm_rope, qk_norm_turn, rms_norm
from kernels_pallas.heads import repeat_heads

_HEADS = (*TOKENS, "heads")


def _implementation(x: jax.Array) -> str | None:
    """Returns "xla" for one token of each row, for which a kernel would move more than the token, else None: the best there is."""
    return "xla" if x.shape[1] == 1 else None


def gated_norm(o: jax.Array, gate: jax.Array, weight: jax.Array, eps: float, *, gate_first: bool = False) -> jax.Array:
    """Returns `gated_rms_norm` of o and gate [B, T, H, D], however they are sharded; weight is [D] or [H, D]."""
    local = functools.partial(gated_rms_norm, eps=eps, gate_first=gate_first, implementation=_implementation(o))
    return shard_map_by_axes(local, (o, gate, weight), (_HEADS, _HEADS, ("heads",) if weight.ndim == 2 else (None,)), _HEADS)


def hidden_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns `rms_norm` of x [B, T, hidden] by weight [hidden]; tokens may be sharded, channels are not."""
    local = functools.partial(rms_norm, eps=eps, implementation=_implementation(x))
    return shard_map_by_axes(local, (x, weight), (TOKENS, (None,)), TOKENS)


def normed_and_rotated(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array | None,
    k_weight: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    *,
    axes: tuple[str | None, str | None],
) -> tuple[jax.Array, jax.Array]:
    """Returns q [B, T, H, D] and k [B, T, Hkv, D], each head normed by its weight [D] (None: not at all), then rotated.

    On a TPU they are in memory with their heads before their tokens, as attention's kernel reads them.

    Args:
      cos, sin: [B, T, R / 2], of every token's angles; channels i and i + R / 2 turn together.
      axes: the logical axes of the heads of q and of k.
    """
    implementation = _implementation(q)

    def local(q, k, q_weight, k_weight, cos, sin):
        q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, implementation=implementation)
        return q.swapaxes(1, 2), k.swapaxes(1, 2)

    heads = tuple((*TOKENS, axis if divides_heads(x.shape[2], axis) else None) for x, axis in zip((q, k), axes, strict=True))
    return shard_map_by_axes(local, (q, k, q_weight, k_weight, cos, sin), (*heads, (None,), (None,), TOKENS, TOKENS), heads)


def normed_and_turned(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    q_bias: jax.Array,
    k_bias: jax.Array,
    angle: jax.Array,
    eps: float,
    *,
    halves: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns `qk_norm_turn` of q and k [B, T, R, heads, K] and angle [B, T, H, A], however they are sharded.

    Heads that the mesh does not divide are repeated before, as in `parallel.recurrence`.
    """
    local = functools.partial(qk_norm_turn, eps=eps, halves=halves, implementation=implementation or _implementation(q))
    q, k = (x if divides_heads(x.shape[3]) else repeat_heads(x, angle.shape[2]) for x in (q, k))
    heads = (*TOKENS, None, "heads")
    axes = (heads, heads, (None,), (None,), ("heads",), ("heads",), _HEADS)
    return shard_map_by_axes(local, (q, k, q_weight, k_weight, q_bias, k_bias, angle), axes, (heads, heads))
