"""Rotary position embeddings: default, linear, llama3 and YaRN frequencies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.config import RopeConfig


def _llama3(inv_freq: np.ndarray, rope: RopeConfig) -> tuple[np.ndarray, float]:
    factor, low, high = (rope.number(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope.number("original_max_position_embeddings")
    turns = context * inv_freq / (2 * math.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq, 1.0


def _yarn(inv_freq: np.ndarray, rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    factor = rope.option("factor")
    context = rope.option("original_max_position_embeddings") or max_positions
    if factor is None:
        factor = max_positions / context

    def dim_of(rotations):
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.option("beta_fast") or 32), dim_of(rope.option("beta_slow") or 1)
    if rope.option("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low or 0.001  # negative where the original context is shorter than one rotation: nothing is interpolated
    ramp = np.clip((np.arange(head_dim // 2) - low) / span, 0, 1)
    freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)

    def mscale(scale, m=1.0):
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    attention = rope.option("attention_factor")
    if attention is None:
        m, m_all = rope.option("mscale"), rope.option("mscale_all_dim")
        attention = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)
    return freq, float(attention)


def rope_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """Returns the inverse frequencies [head_dim / 2], in radians per position, and the factor on cos and sin.

    Sources: llama3 scaling as released with Llama 3.1; YaRN, arXiv 2309.00071, section 3.
    """
    inv_freq = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return inv_freq / rope.number("factor"), 1.0
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope)
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, head_dim, max_positions)
    return inv_freq, 1.0


def rotate(x: jax.Array, positions: jax.Array, inv_freq: np.ndarray, factor: float = 1.0) -> jax.Array:
    """Rotates the two halves of the last axis by position * inv_freq.

    Args:
      x: [B, T, H, D].
      positions: [B, T] int.
      inv_freq: [D / 2], in radians per position.
      factor: what cos and sin are multiplied by (YaRN).

    Returns:
      [B, T, H, D] in x's dtype.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq, jnp.float32)
    cos = (jnp.cos(angle) * factor)[:, :, None].astype(x.dtype)
    sin = (jnp.sin(angle) * factor)[:, :, None].astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
