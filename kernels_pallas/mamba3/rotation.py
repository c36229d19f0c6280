"""The rotation of queries and keys by angles that the data chooses, added up over the tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

TURN = 2 * math.pi
HIGH = 6.28125  # 2 pi in 8 bits, so that small multiples are exact
LOW = TURN - HIGH
BLOCK = 64  # tokens whose angles are added up directly; longer sums go on modulo a turn, so that they lose no digits


def within_turn(angle: jax.Array) -> jax.Array:
    """Returns the angle modulo 2 pi, about [0, 2 pi), without the error of 2 pi in float32 for each turn."""
    turns = jnp.floor(angle / TURN)
    return (angle - turns * HIGH) - turns * LOW


def rotate(x: jax.Array, angle: jax.Array, halves: bool) -> jax.Array:
    """Rotates pairs of channels of x [..., H, K] by angle [..., H, A], A <= K / 2: the first A pairs, the others stay.

    Args:
      halves: pair channel j with j + K / 2, as the released MIMO kernel does; else 2j with 2j + 1, as the SISO kernel.
    """
    K, A = x.shape[-1], angle.shape[-1]
    cos, sin = (f(angle).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    if halves:
        a, b = x[..., : K // 2], x[..., K // 2 :]
        first, second = a[..., :A] * cos - b[..., :A] * sin, a[..., :A] * sin + b[..., :A] * cos
        return jnp.concatenate([first, a[..., A:], second, b[..., A:]], axis=-1)
    a, b = x[..., : 2 * A : 2], x[..., 1 : 2 * A : 2]
    pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([pairs.reshape(*x.shape[:-1], 2 * A), x[..., 2 * A :]], axis=-1)


def cumulative_angles(turn: jax.Array, start: jax.Array | None = None, segments: jax.Array | None = None) -> jax.Array:
    """Returns start + turn_0 + ... + turn_t modulo 2 pi, [B, T, H, A].

    Args:
      turn: [B, T, H, A], the rotation that each token adds, in radians.
      start: [B, H, A], or None for 0.
      segments: [B, T], of `segment_index`. The sum restarts from 0 where a segment begins; the first segment has `start`. None:
        one segment.
    """
    angle = _sums(turn, start)
    if segments is None:
        return angle
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    begin = jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1]), 0), axis=1)
    before = jnp.pad(angle, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    before = jnp.take_along_axis(before, begin[..., None, None], axis=1)
    return jnp.where((segments == 0)[..., None, None], angle, within_turn(angle - before))


def _sums(turn: jax.Array, start: jax.Array | None) -> jax.Array:
    """Returns `cumulative_angles` of one segment."""
    B, T, *rest = turn.shape
    padded = T + -T % BLOCK
    blocks = jnp.pad(turn, ((0, 0), (0, padded - T), (0, 0), (0, 0))).reshape(B, padded // BLOCK, BLOCK, *rest)
    inside = jnp.cumsum(blocks, axis=2)
    until = jax.lax.associative_scan(lambda a, b: within_turn(a + b), within_turn(inside[:, :, -1]), axis=1)
    before = jnp.concatenate([jnp.zeros_like(until[:, :1]), until[:, :-1]], axis=1)
    before = before if start is None else before + start[:, None]
    return within_turn(inside + before[:, :, None]).reshape(B, padded, *rest)[:, :T]
