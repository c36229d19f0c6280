"""Gated KalmaNet: two decayed states and a ridge-regression solve at every token.

    H_t = e^{g_t} H_{t-1} + k_t k_t'        S_t = e^{g_t} S_{t-1} + k_t v_t'
    x_t ~ (H_t + lambda_t I)^-1 q_t         lambda_t = ridge_strength * |H_t|_F
    o_t = scale * S_t' (q_t + alpha_t (x_t - q_t))

The gradient treats x as the exact solution (implicit differentiation).

The ridge is relative to |H_t|_F because that bounds the condition number. |H_t|_F is at least the largest eigenvalue of
H_t, and costs no eigenvalue problem; the eigenvalues of H_t + lambda_t I are between lambda_t and
(1 + 1 / ridge_strength) lambda_t. An absolute ridge would be negligible after many keys and dominant after a strong decay;
with the relative one a fixed number of iterations is equally exact for every token, x scales like 1 / |H_t|_F, and the
coefficients of the iteration are the same for all tokens (`chebyshev.py`).
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
from kernels_pallas.contract import GatedKalmaNet, GatedKalmaNetStep, States
from kernels_pallas.gated_kalmanet.chunked import chunked_queries, gated_kalmanet_chunked
from kernels_pallas.gated_kalmanet.composed import composed, gated
from kernels_pallas.gated_kalmanet.gpu import gated_kalmanet_gpu
from kernels_pallas.gated_kalmanet.reference import gated_kalmanet_reference, gated_kalmanet_update
from kernels_pallas.gated_kalmanet.solvers import check_solver
from kernels_pallas.gated_kalmanet.tpu import gated_kalmanet_tpu
from kernels_pallas.gated_kalmanet.tpu_step import gated_kalmanet_step_tpu
from kernels_pallas.heads import dims_of_summary, grouped
from kernels_pallas.linear_attention import linear_attention_summary

__all__ = ["gated_kalmanet", "gated_kalmanet_queries", "gated_kalmanet_step", "gated_kalmanet_summary"]

IMPLEMENTATIONS: dict[str, GatedKalmaNet] = {
    "reference": composed(gated_kalmanet_reference),
    "xla": composed(gated_kalmanet_chunked),
    "pallas_tpu": gated_kalmanet_tpu,
    "pallas_gpu": composed(gated_kalmanet_gpu),
}
PRECISIONS = ("fast", "accurate")


def gated_kalmanet(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    ridge_strength: float = 0.02,
    num_iter: int = 30,
    *,
    beta: jax.Array | None = None,
    bp_lambda: bool = True,
    precision: str = "fast",
    solver: str = "chebyshev",
    scale: float | None = None,
    initial_state: States | tuple[None, None] | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, States]:
    """The Gated KalmaNet recurrence (arXiv 2511.21016, section 4), with an iterative solve at every token.

    Args:
      q: [B, T, H, K], L2-normalized.
      k: [B, T, Hk, K], L2-normalized, Hk a divisor of H: head h reads head h // (H / Hk), as if each head were repeated in place.
      v: [B, T, Hv, V], Hv a divisor of H, likewise.
      alpha: [B, T, H], in [0, 1]: 1 uses the solution, 0 the query itself.
      log_decay: [B, T, H], <= 0, of both states.
      ridge_strength: lambda / |H|_F, above 0; the condition number of the solve is at most 1 + 1 / ridge_strength.
      num_iter: iterations of the solver; 0 skips the solve (x = q). For "chebyshev" the relative error of x is at most
        1 / T_{num_iter + 1}(1 + 2 ridge_strength), T the Chebyshev polynomials: 3.2e-4 with the defaults.
      beta: [B, T, H], multiplies every head's k and v, or None.
      bp_lambda: whether lambda is differentiated through H.
      precision: "fast" (an output in v's dtype; the TPU kernel solves to 2e-3 of float64 from bf16 inputs) or
        "accurate" (an output in float32, to 2e-5). The other implementations solve in float32 in both.
      solver: "chebyshev", by which released checkpoints were trained, or "cg", conjugate gradients: 18 iterations are about as
        exact as 30 of "chebyshev", for which the error of the output on many kinds of keys is at most 1.5e-3 with "fast".
      scale: multiplies the output; default K^-0.5.
      initial_state: (h_kk [B, H, K, K], h_kv [B, H, K, V]), or None for zeros.
      segment_ids: [B, T] int, or None.
      chunk_size: tokens per chunk of the XLA and GPU forms (default 64, or 32 on a CPU); TPU chunks have 128.
      implementation: "reference", "xla", "pallas_tpu", "pallas_gpu" or None (the best the backend has).

    Returns:
      o [B, T, H, V] in v's dtype (float32 if accurate) and (h_kk, h_kv) in float32.

    Raises:
      ValueError: a shape does not fit the others, or an option is out of its range.
    """
    d = grouped("gated_kalmanet", dims_of("gated_kalmanet", q, v), k=k, v=v)
    h_kk, h_kv = (None, None) if initial_state is None else initial_state
    check_shapes(
        "gated_kalmanet",
        d,
        k=(k, "B T Hk K"),
        v=(v, "B T Hv V"),
        alpha=(alpha, "B T H"),
        log_decay=(log_decay, "B T H"),
        beta=(beta, "B T H"),
        h_kk=(h_kk, "B H K K"),
        h_kv=(h_kv, "B H K V"),
        segment_ids=(segment_ids, "B T"),
    )
    if precision not in PRECISIONS:
        raise ValueError(f"gated_kalmanet: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_solver("gated_kalmanet", solver, ridge_strength)
    dtype = accumulator(q, k, v, alpha, log_decay, beta)
    h_kk = jnp.zeros((d["B"], d["H"], d["K"], d["K"]), dtype) if h_kk is None else h_kk.astype(dtype)
    h_kv = jnp.zeros((d["B"], d["H"], d["K"], d["V"]), dtype) if h_kv is None else h_kv.astype(dtype)
    scale = scale_or_default(scale, d["K"])
    check_options("gated_kalmanet", scale=scale, chunk_size=chunk_size, num_iter=num_iter, ridge_strength=ridge_strength)
    run = pick_implementation("gated_kalmanet", implementation, IMPLEMENTATIONS, q, k, v)
    arrays = alike("gated_kalmanet", q, k, v, alpha, log_decay, beta, (h_kk, h_kv), segment_index(segment_ids))
    q, k, v, alpha, log_decay, beta, state, segments = arrays
    options = (scale, chunk_size, ridge_strength, num_iter, bp_lambda, precision, solver)
    return run(q, k, v, alpha, log_decay, beta, state, segments, *options)


def gated_kalmanet_queries(
    q: jax.Array,
    k: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    ridge_strength: float = 0.02,
    num_iter: int = 30,
    *,
    bp_lambda: bool = True,
    solver: str = "chebyshev",
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the queries with which linear attention over k and v is Gated KalmaNet: q_t + alpha_t (x_t - q_t).

    They do not depend on the values, so they make one solve serve any number of them. Computed by the XLA form in float32.

    Args: those of `gated_kalmanet` that concern the solve; `initial_state` is h_kk [B, H, K, K] alone.

    Returns:
      [B, T, H, K] and h_kk after the tokens, both float32.

    Raises:
      ValueError: a shape does not fit the others, or an option is out of its range.
    """
    op = "gated_kalmanet_queries"
    d = dims_of(op, q, k)
    scalars = dict(alpha=(alpha, "B T H"), log_decay=(log_decay, "B T H"), segment_ids=(segment_ids, "B T"))
    check_shapes(op, d, k=(k, "B T H K"), initial_state=(initial_state, "B H K K"), **scalars)
    check_solver(op, solver, ridge_strength)
    check_options(op, scale=1.0, chunk_size=chunk_size, num_iter=num_iter, ridge_strength=ridge_strength)
    dtype = accumulator(q, k, alpha, log_decay)
    h_kk = jnp.zeros((d["B"], d["H"], d["K"], d["K"]), dtype) if initial_state is None else initial_state.astype(dtype)
    q, k, alpha, log_decay, h_kk, segments = alike(op, q, k, alpha, log_decay, h_kk, segment_index(segment_ids))
    return chunked_queries(q, k, alpha, log_decay, h_kk, segments, chunk_size, ridge_strength, num_iter, bp_lambda, solver)


def gated_kalmanet_summary(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    beta: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, States]:
    """Returns what tokens make of the states before them, (H, S) -> decay (H, S) + states: what a sequence over devices passes on.

    In float32 throughout: in bf16 H would lose what the solve needs.

    Args:
      k, v, log_decay, beta, segment_ids: as in `gated_kalmanet`; H is the number of decays.

    Returns:
      decay [B, H], 0 where a segment begins after the first token, and (h_kk [B, H, K, K], h_kv [B, H, K, V]).

    Raises:
      ValueError: a shape does not fit the others.
    """
    op = "gated_kalmanet_summary"
    dims = dims_of_summary(op, k, v, log_decay)
    check_shapes(op, dims, k=(k, "B T Hk K"), v=(v, "B T Hv V"), beta=(beta, "B T H"))
    k, v, log_decay, beta, segment_ids = alike(op, k, v, log_decay, beta, segment_ids)
    dtype = accumulator(k, v, log_decay, beta)
    k, v = (gated(x, beta, dims["H"]).astype(dtype) for x in (k, v))
    decay, both = linear_attention_summary(k, jnp.concatenate([k, v], axis=-1), log_decay, segment_ids=segment_ids)
    return decay, (both[..., : k.shape[-1]], both[..., k.shape[-1] :])


def gated_kalmanet_step(
    q: jax.Array,  # [B, H, K]
    k: jax.Array,  # [B, Hk, K]
    v: jax.Array,  # [B, Hv, V]
    alpha: jax.Array,  # [B, H]
    log_decay: jax.Array,  # [B, H]
    ridge_strength: float = 0.02,
    num_iter: int = 30,
    *,
    state: States,
    beta: jax.Array | None = None,  # [B, H]
    bp_lambda: bool = True,
    solver: str = "chebyshev",
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, States]:
    """Returns (o [B, H, V], the states (h_kk, h_kv) after one token); the options are those of `gated_kalmanet`.

    Raises:
      ValueError: a shape does not fit the others, or an option is out of its range.
    """
    op = "gated_kalmanet_step"
    d = grouped(op, dims_of(op, q, v, axes="B H"), k=k, v=v)
    scalars = dict(alpha=(alpha, "B H"), log_decay=(log_decay, "B H"), beta=(beta, "B H"))
    states = dict(h_kk=(state[0], "B H K K"), h_kv=(state[1], "B H K V"))
    check_shapes(op, d, k=(k, "B Hk K"), v=(v, "B Hv V"), **scalars, **states)
    scale = scale_or_default(scale, q.shape[-1])
    check_solver(op, solver, ridge_strength)
    check_options(op, scale=scale, num_iter=num_iter, ridge_strength=ridge_strength)
    run = pick_implementation(op, implementation, STEPS, q, k, v)
    dtype = accumulator(q, k, v, alpha, log_decay, beta)
    state = state[0].astype(dtype), state[1].astype(dtype)
    q, k, v, alpha, log_decay, beta, state = alike(op, q, k, v, alpha, log_decay, beta, state)
    k, v = (gated(x, beta, d["H"]) for x in (k, v))
    return run(q, k, v, alpha, log_decay, state, scale, ridge_strength, num_iter, bp_lambda, solver)


def _step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    state: States,
    scale: float,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: str,
) -> tuple[jax.Array, States]:
    q, k, values, alpha, log_decay = (x.astype(state[0].dtype) for x in (q, k, v, alpha, log_decay))
    options = (scale, ridge_strength, num_iter, bp_lambda, solver)
    o, state = gated_kalmanet_update(q, k, values, alpha, log_decay, state, *options)
    return o.astype(v.dtype), state


STEPS: dict[str, GatedKalmaNetStep] = {"reference": _step, "xla": _step, "pallas_tpu": gated_kalmanet_step_tpu}
