"""Linear attention with a scalar decay per head.

S_t = e^{g_t} S_{t-1} + k_t v_t',     o_t = scale * q_t' S_t
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
from kernels_pallas.linear_attention.chunked import linear_attention_chunked
from kernels_pallas.linear_attention.gpu import linear_attention_gpu
from kernels_pallas.linear_attention.reference import linear_attention_reference, linear_attention_update
from kernels_pallas.linear_attention.tpu import linear_attention_tpu
from kernels_pallas.linear_attention.tpu_step import linear_attention_step_tpu

__all__ = ["linear_attention", "linear_attention_step", "linear_attention_summary"]

IMPLEMENTATIONS: dict[str, LinearAttention] = {
    "reference": linear_attention_reference,
    "xla": linear_attention_chunked,
    "pallas_tpu": linear_attention_tpu,
    "pallas_gpu": linear_attention_gpu,
}


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scalar-decay linear attention ("simple GLA", arXiv 2312.06635; SSD, arXiv 2405.21060).

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      log_decay: [B, T, H], <= 0.
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
    d = dims_of("linear_attention", q, v)
    check_shapes(
        "linear_attention",
        d,
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        log_decay=(log_decay, "B T H"),
        initial_state=(initial_state, "B H K V"),
        segment_ids=(segment_ids, "B T"),
    )
    dtype = accumulator(q, k, v, log_decay)
    state = jnp.zeros((d["B"], d["H"], d["K"], d["V"]), dtype) if initial_state is None else initial_state.astype(dtype)
    scale = scale_or_default(scale, d["K"])
    check_options("linear_attention", scale=scale, chunk_size=chunk_size)
    run = pick_implementation("linear_attention", implementation, IMPLEMENTATIONS, q, k, v)
    q, k, v, log_decay, state, segments = alike("linear_attention", q, k, v, log_decay, state, segment_index(segment_ids))
    return run(q, k, v, log_decay, state, segments, scale, chunk_size)


def linear_attention_summary(
    k: jax.Array, v: jax.Array, log_decay: jax.Array, *, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns what tokens make of the state before them, S -> decay S + state: what a sequence over several devices passes on.

    Args:
      k, v, log_decay, segment_ids: as in `linear_attention`.

    Returns:
      decay [B, H], 0 where a segment begins after the first token, and state [B, H, K, V]; both float32.

    Raises:
      ValueError: a shape does not fit the others.
    """
    check_shapes(
        "linear_attention_summary",
        dims_of("linear_attention_summary", k, v, "k"),
        v=(v, "B T H V"),
        log_decay=(log_decay, "B T H"),
        segment_ids=(segment_ids, "B T"),
    )
    k, v, log_decay, segment_ids = alike("linear_attention_summary", k, v, log_decay, segment_ids)
    dtype = accumulator(k, v, log_decay)
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
    k: jax.Array,  # [B, H, K]
    v: jax.Array,  # [B, H, V]
    log_decay: jax.Array,  # [B, H]
    *,
    state: jax.Array,  # [B, H, K, V]
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, H, V], the state after one token); the options are those of `linear_attention`.

    Raises:
      ValueError: a shape does not fit the others, or the scale is 0.
    """
    op = "linear_attention_step"
    d = dims_of(op, q, v, axes="B H")
    check_shapes(op, d, k=(k, "B H K"), v=(v, "B H V"), log_decay=(log_decay, "B H"), state=(state, "B H K V"))
    scale = scale_or_default(scale, q.shape[-1])
    check_options(op, scale=scale)
    run = pick_implementation(op, implementation, STEPS, q, k, v)
    state = state.astype(accumulator(q, k, v, log_decay))
    q, k, v, log_decay, state = alike(op, q, k, v, log_decay, state)
    return run(q, k, v, log_decay, state, scale)


def _step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    q, k, values, log_decay = (x.astype(state.dtype) for x in (q, k, v, log_decay))
    o, state = linear_attention_update(q, k, values, log_decay, state, scale)
    return o.astype(v.dtype), state


STEPS: dict[str, LinearAttentionStep] = {"reference": _step, "xla": _step, "pallas_tpu": linear_attention_step_tpu}
