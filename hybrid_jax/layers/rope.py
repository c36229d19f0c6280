"""Rotary position embeddings: default, linear, llama3, YaRN and LongRoPE frequencies, of a head's first channels or all."""

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
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else turns >= low  # equal in Llama 4 Scout: a step
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


def _longrope(inv_freq: np.ndarray, rope: RopeConfig, max_positions: int, long: bool) -> tuple[np.ndarray, float]:
    context, factor, attention = (rope.option(n) for n in ("original_max_position_embeddings", "factor", "attention_factor"))
    if factor is None:
        factor = max_positions / context
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return inv_freq / np.asarray(rope.option("long_factor" if long else "short_factor")), attention


def rope_frequencies(rope: RopeConfig, head_dim: int, max_positions: int, *, long: bool = False) -> tuple[np.ndarray, float]:
    """Returns the inverse frequencies [rotated channels / 2], in radians per position, and the factor on cos and sin.

    Args:
      long: of LongRoPE those of documents longer than the original context.

    Sources: llama3 scaling as released with Llama 3.1; YaRN, arXiv 2309.00071, section 3; LongRoPE, arXiv 2402.13753.
    """
    head_dim = rope.channels(head_dim)
    inv_freq = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return inv_freq / rope.number("factor"), 1.0
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope)
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, head_dim, max_positions)
    if rope.kind == "longrope":
        return _longrope(inv_freq, rope, max_positions, long)
    return inv_freq, 1.0


def document_frequencies(
    rope: RopeConfig, head_dim: int, max_positions: int, positions: jax.Array, segment_ids: jax.Array | None
) -> tuple[np.ndarray | jax.Array, float]:
    """Returns the inverse frequencies of tokens, [R / 2] for R rotated channels or [B, T, R / 2], and the factor on cos and sin.

    Only LongRoPE has others per token: a document of more tokens than the original context takes its long factors, from its first
    token on.

    Args:
      positions: [B, T], in every token's document.
      segment_ids: [B, T]; None: no document is longer than the original context.

    Raises:
      ValueError: rows may hold longer documents, and there are no segment ids.
    """
    short, factor = rope_frequencies(rope, head_dim, max_positions)
    if rope.kind != "longrope" or positions.shape[1] <= rope.number("original_max_position_embeddings"):
        return short, factor
    if segment_ids is None:
        raise ValueError(
            f"longrope: rows of {positions.shape[1]} tokens need segment_ids, by which the length of a document is known"
        )
    long, _ = rope_frequencies(rope, head_dim, max_positions, long=True)

    def last_positions(segments, positions):
        first = jnp.searchsorted(jnp.sort(segments), segments)  # a number below T that the tokens of a document share
        return jnp.zeros_like(positions).at[first].max(positions)[first]

    longer = jax.vmap(last_positions)(segment_ids, positions) >= rope.number("original_max_position_embeddings")
    return jnp.where(longer[..., None], jnp.asarray(long, jnp.float32), jnp.asarray(short, jnp.float32)), factor


def cos_sin(positions: jax.Array, inv_freq: np.ndarray | jax.Array, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Returns the cosine and the sine of every token's angles, times `factor` (YaRN, LongRoPE), [B, T, R / 2] float32.

    Args:
      positions: [B, T] int.
      inv_freq: [R / 2] or [B, T, R / 2], in radians per position.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, halves: bool = True) -> jax.Array:
    """Rotates the first R channels by the angles of `cos_sin`; the others stay as they are.

    Args:
      x: [B, T, H, D].
      cos, sin: [B, T, R / 2]; R is at most D.
      halves: channels i and i + R / 2 turn together; False: 2 i and 2 i + 1.

    Returns:
      [B, T, H, D] in x's dtype, rounded to it once.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    R = 2 * cos.shape[-1]
    rotated, dtype = x[..., :R].astype(jnp.promote_types(x.dtype, jnp.float32)), x.dtype
    a, b = (rotated[..., : R // 2], rotated[..., R // 2 :]) if halves else (rotated[..., ::2], rotated[..., 1::2])
    turned = [a * cos - b * sin, b * cos + a * sin]
    if not halves:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], R)]
    return jnp.concatenate([*(part.astype(dtype) for part in turned), x[..., R:]], axis=-1)
