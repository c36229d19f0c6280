"""Linear attention with a scalar decay per head.

S_t = e^{g_t} S_{t-1} + w_t k_t v_t',     o_t = scale * q_t' S_t + d v_t,     w = value_scale or 1, d = skip or 0

With `own_scale` u the output reads the token's own product with the weight u_t in place of w_t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import (
    accumulator,
    alike,
    check_options,
    check_shapes,
    dims_of,
    pick_implementation,
    scale_or_default,
    segment_index,
)
from kernels_pallas.chunks import matmul
from kernels_pallas.contract import LinearAttention, LinearAttentionStep
from kernels_pallas.heads import dims_of_summary, grouped, repeat_heads
from kernels_pallas.linear_attention.chunked import linear_attention_chunked
from kernels_pallas.linear_attention.composed import composed, scaled_values, with_skip
from kernels_pallas.linear_attention.gpu import linear_attention_gpu
from kernels_pallas.linear_attention.reference import linear_attention_reference, linear_attention_update
from kernels_pallas.linear_attention.tpu import linear_attention_tpu
from kernels_pallas.linear_attention.tpu_step import linear_attention_step_tpu

__all__ = ["composed", "linear_attention", "linear_attention_step", "linear_attention_summary"]

IMPLEMENTATIONS: dict[str, LinearAttention] = {
    "reference": composed(linear_attention_reference),
    "xla": composed(linear_attention_chunked),
    "pallas_tpu": linear_attention_tpu,
    "pallas_gpu": composed(linear_attention_gpu),
}


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    value_scale: jax.Array | None = None,
    own_scale: jax.Array | None = None,
    together: int = 1,
    skip: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scalar-decay linear attention ("simple GLA", arXiv 2312.06635; SSD, arXiv 2405.21060).

    Args:
      q: [B, T, H, K].
      k: [B, T, Hk, K], Hk a divisor of H: head h reads head h // (H / Hk), as if each head were repeated in place.
      v: [B, T, Hv, V], Hv a divisor of H, likewise.
      log_decay: [B, T, H], <= 0.
      value_scale: [B, T, H], multiplies v where the state takes it (Mamba-2's dt), or None.
      own_scale: [B, T, H], multiplies v where the token's own output reads it (Mamba-3), or None: value_scale does.
      together: how many successive tokens are one step with `own_scale`, a divisor of T: each output of a step reads all inputs of
        its step, also later ones, with own_scale. Only the first token of a step may decay and begin a segment.
      skip: [H], times v it is added to o (Mamba-2's D), or None; neither `scale` nor the scales of values multiply it.
      scale: multiplies q; default K^-0.5.
      initial_state: [B, H, K, V], or None for zeros.
      segment_ids: [B, T] int, or None.
      chunk_size: tokens per chunk of the XLA and GPU forms (default 64, or 32 on a CPU); TPU chunks have 128.
      implementation: "reference", "xla", "pallas_tpu", "pallas_gpu" or None (the best the backend has).

    Returns:
      o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    Raises:
      ValueError: a shape does not fit the others, or an option is out of its range; the message names it.
    """
    op = "linear_attention"
    d = grouped(op, dims_of(op, q, v), k=k, v=v)
    check_shapes(
        op,
        d,
        k=(k, "B T Hk K"),
        v=(v, "B T Hv V"),
        log_decay=(log_decay, "B T H"),
        value_scale=(value_scale, "B T H"),
        own_scale=(own_scale, "B T H"),
        skip=(skip, "H"),
        initial_state=(initial_state, "B H K V"),
        segment_ids=(segment_ids, "B T"),
    )
    if together < 1 or d["T"] % together or (together > 1 and own_scale is None):
        want = "1 without own_scale, with it a divisor of the tokens"
        raise ValueError(f"{op}: together must be {want}, got {together} for {d['T']} tokens")
    dtype = accumulator(q, k, v, log_decay, value_scale, own_scale, skip)
    state = jnp.zeros((d["B"], d["H"], d["K"], d["V"]), dtype) if initial_state is None else initial_state.astype(dtype)
    scale = scale_or_default(scale, d["K"])
    check_options(op, scale=scale, chunk_size=chunk_size)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, q, k, v)
    arrays = alike(op, q, k, v, log_decay, value_scale, own_scale, skip, state, segment_index(segment_ids))
    q, k, v, log_decay, value_scale, own_scale, skip, state, segments = arrays
    return run(q, k, v, log_decay, value_scale, own_scale, skip, state, segments, scale, chunk_size, together)


def linear_attention_summary(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    value_scale: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns what tokens make of the state before them, S -> decay S + state: what a sequence over several devices passes on.

    Args:
      k, v, log_decay, value_scale, segment_ids: as in `linear_attention`; H is the number of decays.

    Returns:
      decay [B, H], 0 where a segment begins after the first token, and state [B, H, K, V]; both float32.

    Raises:
      ValueError: a shape does not fit the others.
    """
    op = "linear_attention_summary"
    dims = dims_of_summary(op, k, v, log_decay)
    check_shapes(
        op,
        dims,
        k=(k, "B T Hk K"),
        v=(v, "B T Hv V"),
        log_decay=(log_decay, "B T H"),
        value_scale=(value_scale, "B T H"),
        segment_ids=(segment_ids, "B T"),
    )
    k, v, log_decay, value_scale, segment_ids = alike(op, k, v, log_decay, value_scale, segment_ids)
    dtype = accumulator(k, v, log_decay, value_scale)
    k, v = repeat_heads(k, dims["H"]), scaled_values(repeat_heads(v, dims["H"]).astype(dtype), value_scale, v.dtype)
    g = log_decay.astype(dtype)
    # g_{t+1} + ... + g_T, added up without g_t: no difference of sums, so a strong decay takes no digits from others
    later = jax.lax.cumsum(jnp.pad(g[:, 1:], ((0, 0), (0, 1), (0, 0))), axis=1, reverse=True)
    kept, total = jnp.exp(later), jnp.exp(later[:, 0] + g[:, 0])
    segments = segment_index(segment_ids)
    if segments is not None:
        last = segments[:, -1:]
        kept, total = jnp.where((segments == last)[..., None], kept, 0), jnp.where(last == 0, total, 0)
    return total, matmul("bthk,bthv->bhkv", (k * kept[..., None]).astype(k.dtype), v, dtype=dtype)


def linear_attention_step(
    q: jax.Array,  # [B, H, K]
    k: jax.Array,  # [B, Hk, K]
    v: jax.Array,  # [B, Hv, V]
    log_decay: jax.Array,  # [B, H]
    *,
    state: jax.Array,  # [B, H, K, V]
    value_scale: jax.Array | None = None,  # [B, H]
    skip: jax.Array | None = None,  # [H]
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, H, V], the state after one token); the options are those of `linear_attention`.

    Raises:
      ValueError: a shape does not fit the others, or the scale is 0.
    """
    op = "linear_attention_step"
    d = grouped(op, dims_of(op, q, v, axes="B H"), k=k, v=v)
    scalars = dict(log_decay=(log_decay, "B H"), value_scale=(value_scale, "B H"), skip=(skip, "H"))
    check_shapes(op, d, k=(k, "B Hk K"), v=(v, "B Hv V"), **scalars, state=(state, "B H K V"))
    scale = scale_or_default(scale, q.shape[-1])
    check_options(op, scale=scale)
    run = pick_implementation(op, implementation, STEPS, q, k, v)
    dtype = accumulator(q, k, v, log_decay, value_scale, skip)
    q, k, v, log_decay, value_scale, skip, state = alike(op, q, k, v, log_decay, value_scale, skip, state.astype(dtype))
    k, v = repeat_heads(k, d["H"]), repeat_heads(v, d["H"])
    wide = v.astype(dtype)
    o, state = run(q, k, scaled_values(wide, value_scale, v.dtype), log_decay, state, scale)
    return with_skip(o, skip, wide), state


def _step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    q, k, values, log_decay = (x.astype(state.dtype) for x in (q, k, v, log_decay))
    o, state = linear_attention_update(q, k, values, log_decay, state, scale)
    return o.astype(v.dtype), state


STEPS: dict[str, LinearAttentionStep] = {"reference": _step, "xla": _step, "pallas_tpu": linear_attention_step_tpu}
