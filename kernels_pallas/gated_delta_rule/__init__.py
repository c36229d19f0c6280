"""The gated delta rule of Gated DeltaNet.

S_t = e^{g_t} (I - beta_t k_t k_t') S_{t-1} + beta_t k_t v_t',     o_t = scale * q_t' S_t
"""

from __future__ import annotations

import functools

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
from kernels_pallas.contract import GatedDeltaRule, GatedDeltaRuleStep
from kernels_pallas.gated_delta_rule.chunked import gated_delta_rule_chunked
from kernels_pallas.gated_delta_rule.gpu import gated_delta_rule_gpu
from kernels_pallas.gated_delta_rule.reference import gated_delta_rule_reference, gated_delta_rule_update
from kernels_pallas.gated_delta_rule.tpu import gated_delta_rule_tpu
from kernels_pallas.gated_delta_rule.tpu_step import gated_delta_rule_step_tpu
from kernels_pallas.heads import dims_of_summary, grouped, repeat_heads, with_groups

__all__ = ["gated_delta_rule", "gated_delta_rule_step", "gated_delta_rule_summary"]

IMPLEMENTATIONS: dict[str, GatedDeltaRule] = {
    "reference": with_groups(gated_delta_rule_reference),
    "xla": with_groups(gated_delta_rule_chunked),
    "pallas_tpu": gated_delta_rule_tpu,
    "pallas_gpu": with_groups(gated_delta_rule_gpu),
}


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule (arXiv 2412.06464, equation 10).

    The keys should be L2-normalized; with beta in [0, 2] the update is then a contraction.

    Args:
      q: [B, T, H, K].
      k: [B, T, Hk, K], Hk a divisor of H: head h reads head h // (H / Hk), as if each head were repeated in place.
      v: [B, T, Hv, V], Hv a divisor of H, likewise.
      log_decay: [B, T, H], <= 0.
      beta: [B, T, H], in [0, 2].
      scale: multiplies q; default K^-0.5.
      initial_state: [B, H, K, V], or None for zeros.
      segment_ids: [B, T] int, or None.
      chunk_size: tokens per chunk of the XLA and GPU forms, a power of two (default 64, or 32 on a CPU); TPU chunks have 128.
      implementation: "reference", "xla", "pallas_tpu", "pallas_gpu" or None (the best the backend has).

    Returns:
      o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    Raises:
      ValueError: a shape does not fit the others, the scale is 0, or the chunk is not a power of two.
    """
    d = grouped("gated_delta_rule", dims_of("gated_delta_rule", q, v), k=k, v=v)
    check_shapes(
        "gated_delta_rule",
        d,
        k=(k, "B T Hk K"),
        v=(v, "B T Hv V"),
        log_decay=(log_decay, "B T H"),
        beta=(beta, "B T H"),
        initial_state=(initial_state, "B H K V"),
        segment_ids=(segment_ids, "B T"),
    )
    dtype = accumulator(q, k, v, log_decay, beta)
    state = jnp.zeros((d["B"], d["H"], d["K"], d["V"]), dtype) if initial_state is None else initial_state.astype(dtype)
    scale = scale_or_default(scale, d["K"])
    check_options("gated_delta_rule", scale=scale, chunk_size=chunk_size)
    run = pick_implementation("gated_delta_rule", implementation, IMPLEMENTATIONS, q, k, v)
    arrays = alike("gated_delta_rule", q, k, v, log_decay, beta, state, segment_index(segment_ids))
    q, k, v, log_decay, beta, state, segments = arrays
    return run(q, k, v, log_decay, beta, state, segments, scale, chunk_size)


def gated_delta_rule_summary(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns what tokens make of the state before them, S -> transition S + state: what a sequence over devices passes on.

    The transition, a product of e^g (I - beta k k'), is the state that grows from the identity and values of zero.

    Args:
      k, v, log_decay, beta, segment_ids, implementation: as in `gated_delta_rule`; H is the number of decays.

    Returns:
      transition [B, H, K, K], 0 where a segment begins after the first token, and state [B, H, K, V]; both float32.

    Raises:
      ValueError: as `gated_delta_rule`.
    """
    dims = dims_of_summary("gated_delta_rule_summary", k, v, log_decay)
    B, H, K, V = (dims[n] for n in "BHKV")
    dtype = accumulator(k, v, log_decay, beta)

    def final(v, start, k, log_decay, beta, segment_ids):
        own = functools.partial(gated_delta_rule, initial_state=start, segment_ids=segment_ids, implementation=implementation)
        return own(repeat_heads(k, H), k, v, log_decay, beta)[1]

    nothing = jnp.zeros((B, H, K, V), dtype)
    identity = jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, H, K, K))
    zeros = jnp.zeros((*v.shape[:-1], K), v.dtype)
    arrays = (k, log_decay, beta)
    if K != V:
        transition, added = (final(x, s, *arrays, segment_ids=segment_ids) for x, s in ((zeros, identity), (v, nothing)))
        return transition, added
    # side by side as rows of one batch
    twice = [jnp.concatenate([x, x]) for x in arrays]
    ids = None if segment_ids is None else jnp.concatenate([segment_ids, segment_ids])
    both = final(jnp.concatenate([zeros, v]), jnp.concatenate([identity, nothing]), *twice, segment_ids=ids)
    return both[:B], both[B:]


def gated_delta_rule_step(
    q: jax.Array,  # [B, H, K]
    k: jax.Array,  # [B, Hk, K]
    v: jax.Array,  # [B, Hv, V]
    log_decay: jax.Array,  # [B, H]
    beta: jax.Array,  # [B, H]
    *,
    state: jax.Array,  # [B, H, K, V]
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, H, V], the state after one token); the options are those of `gated_delta_rule`.

    Raises:
      ValueError: a shape does not fit the others, or the scale is 0.
    """
    op = "gated_delta_rule_step"
    d = grouped(op, dims_of(op, q, v, axes="B H"), k=k, v=v)
    scalars = dict(log_decay=(log_decay, "B H"), beta=(beta, "B H"))
    check_shapes(op, d, k=(k, "B Hk K"), v=(v, "B Hv V"), **scalars, state=(state, "B H K V"))
    scale = scale_or_default(scale, q.shape[-1])
    check_options(op, scale=scale)
    run = pick_implementation(op, implementation, STEPS, q, k, v)
    state = state.astype(accumulator(q, k, v, log_decay, beta))
    q, k, v, log_decay, beta, state = alike(op, q, k, v, log_decay, beta, state)
    return with_groups(run)(q, k, v, log_decay, beta, state, scale)


def _step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    q, k, values, log_decay, beta = (x.astype(state.dtype) for x in (q, k, v, log_decay, beta))
    o, state = gated_delta_rule_update(q, k, values, log_decay, beta, state, scale)
    return o.astype(v.dtype), state


STEPS: dict[str, GatedDeltaRuleStep] = {"reference": _step, "xla": _step, "pallas_tpu": gated_delta_rule_step_tpu}
