"""The chunked form: every token of a chunk solves its own system at once, by matmuls with shared factors.

With H0 the state at the chunk's start and rows X (one per token),

    (H_t x_t) = e^{a_t} H0 x_t + sum_{i<=t} e^{a_t - a_i} k_i (k_i' x_t)  =  (X e^a) H0 + ((X K') M) K
    |H_t|_F^2 = e^{2 a_t} |H0|^2 + 2 e^{a_t} (M (k_i' H0 k_i))_t + (M (K K')^2 M')_tt

Each term of the norm is non-negative: nothing cancels under strong decay. The squares of weak states do not fit a
float32 (e^-44 is enough), so the norm is computed as

    H_t = size_t (rho_t H0 / |H0|_max + sum_i beta_ti k_i k_i' / |k_i|^2),      rho_t + sum_i beta_ti = 1
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import differentiable
from kernels_pallas.chunks import (
    ChunkDecay,
    chunk_decay,
    chunk_outputs,
    chunk_states,
    default_chunk,
    from_chunks,
    matmul,
    scan_blocks,
    to_chunks,
)
from kernels_pallas.contract import States
from kernels_pallas.gated_kalmanet.chebyshev import inverse
from kernels_pallas.gated_kalmanet.solvers import SOLVERS
from kernels_pallas.numerics import safe_sqrt


def chunk_matvec(x: jax.Array, k: jax.Array, decay: ChunkDecay, before: jax.Array) -> jax.Array:
    """Returns H_t x_t for every token; x, k [N,B,H,C,K], before [N,B,H,K,K]."""
    scores = matmul("nbhck,nbhik->nbhci", x, k, dtype=x.dtype) * decay.mask
    across = matmul("nbhck,nbhkj->nbhcj", x * decay.reach[..., None], before, dtype=x.dtype)
    return across + matmul("nbhci,nbhik->nbhck", scores, k, dtype=x.dtype)


def chunk_norms(k: jax.Array, decay: ChunkDecay, before: jax.Array) -> jax.Array:
    """Returns |H_t|_F, [N,B,H,C], for every token; k [N,B,H,C,K], before [N,B,H,K,K]."""
    # the norm does not depend on the scales, which therefore have no gradient
    dtype = before.dtype
    squares = jax.lax.stop_gradient(jnp.sum(k * k, axis=-1))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(before), axis=(-2, -1)))
    k, start = k * jnp.sqrt(inverse(squares))[..., None], before * inverse(largest)[..., None, None]
    beta, rho = decay.mask * squares[..., None, :], decay.reach * largest[..., None]
    size = jax.lax.stop_gradient(jnp.sum(beta, axis=-1) + rho)
    beta, rho = beta * inverse(size)[..., None], rho * inverse(size)
    quadratic = jnp.sum(matmul("nbhck,nbhkj->nbhcj", k, start, dtype=dtype) * k, axis=-1)
    gram = matmul("nbhck,nbhik->nbhci", k, k, dtype=dtype) ** 2
    inside = jnp.sum(matmul("nbhci,nbhij->nbhcj", beta, gram, dtype=dtype) * beta, axis=-1)
    cross = matmul("nbhci,nbhi->nbhc", beta, quadratic, dtype=dtype)
    return size * safe_sqrt(rho**2 * jnp.sum(start * start, axis=(-2, -1))[..., None] + 2 * rho * cross + inside)


# (rhs [N,B,H,C,K], k, decay, before, norms [N,B,H,C], ridge_strength, num_iter) -> x [N,B,H,C,K]
Solver = Callable[[jax.Array, jax.Array, ChunkDecay, jax.Array, jax.Array, float, int], jax.Array]


def _in_full_precision(name: str) -> Solver:
    """Returns the named solver of every token of chunks, in the dtype of its right-hand sides (float32, or float64)."""

    def solve(rhs, k, decay, before, norms, ridge_strength, num_iter):
        matvec = functools.partial(chunk_matvec, k=k, decay=decay, before=before)
        return SOLVERS[name](matvec, rhs, norms, ridge_strength, num_iter)

    return solve


IN_FULL_PRECISION = {name: _in_full_precision(name) for name in SOLVERS}


@differentiable(4, 5, 6, 7)
def chunk_solve(
    q: jax.Array,
    k: jax.Array,
    decay: ChunkDecay,
    before: jax.Array,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: Solver,
) -> jax.Array:
    """Returns x_t ~ (H_t + lambda_t I)^-1 q_t for every token, by `solver`; the gradient is the implicit one."""
    return solver(q, k, decay, before, chunk_norms(k, decay, before), ridge_strength, num_iter)


def _solve_fwd(q, k, decay, before, ridge_strength, num_iter, bp_lambda, solver):
    x = chunk_solve(q, k, decay, before, ridge_strength, num_iter, bp_lambda, solver)
    return x, (x, k, decay, before)


def _solve_bwd(ridge_strength, num_iter, bp_lambda, solver, residuals, dx):
    """Differentiate the residual r = (H + lambda I) x - q at fixed x: w = (H + lambda I)^-1 dx, then pull -w back."""
    x, k, decay, before = residuals
    w = chunk_solve(dx, k, decay, before, ridge_strength, num_iter, bp_lambda, solver)

    def applied(k, decay, before):
        symmetric = 0.5 * (before + jnp.swapaxes(before, -1, -2))
        norms = chunk_norms(k, decay, before)
        ridge = ridge_strength * (norms if bp_lambda else jax.lax.stop_gradient(norms))
        return chunk_matvec(x, k, decay, symmetric) + ridge[..., None] * x

    _, pull = jax.vjp(applied, k, decay, before)
    return (w, *pull(-w))


chunk_solve.defvjp(_solve_fwd, _solve_bwd)


def _mixed_queries(
    q: jax.Array,
    k: jax.Array,
    alpha: jax.Array,
    decay: ChunkDecay,
    before: jax.Array,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: Solver,
) -> jax.Array:
    """Returns q + alpha (x - q) [N,B,H,C,K], what reads the states of values; alpha [N,B,H,C]."""
    if not num_iter:
        return q
    return q + alpha[..., None] * (chunk_solve(q, k, decay, before, ridge_strength, num_iter, bp_lambda, solver) - q)


def chunked_queries(
    q: jax.Array,
    k: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    h_kk: jax.Array,
    segments: jax.Array | None,
    chunk_size: int | None,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: str,
) -> tuple[jax.Array, jax.Array]:
    """Returns q + alpha (x - q) [B,T,H,K] and H after the tokens; see `gated_kalmanet_queries`."""
    chunk_size = chunk_size or default_chunk()

    def run(arrays, h_kk, segments):
        q, k, alpha, log_decay = (x.astype(h_kk.dtype) for x in arrays)
        decay = chunk_decay(log_decay, segments, chunk_size, h_kk.dtype)
        qc, kc, mix = (to_chunks(x, chunk_size) for x in (q, k, alpha))
        before, final = chunk_states(kc, kc, decay, h_kk)
        mixed = _mixed_queries(qc, kc, mix, decay, before, ridge_strength, num_iter, bp_lambda, IN_FULL_PRECISION[solver])
        return from_chunks(mixed, q.shape[1]), final

    return scan_blocks(run, (q, k, alpha, log_decay), h_kk, segments, chunk_size)


def gated_kalmanet_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    state: States,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    precision: str,
    solver: str,
    solvers: Mapping[str, Solver] = IN_FULL_PRECISION,
) -> tuple[jax.Array, States]:
    """The `xla` implementation of `gated_kalmanet`; see `kernels_pallas.contract`.

    Args:
      solvers: solve for every token of the chunks, by the name of the solver.
    """
    chunk_size = chunk_size or default_chunk()
    out_dtype = v.dtype if precision == "fast" else state[0].dtype

    def run(arrays, state, segments):
        (q, k, v, alpha, log_decay), (h_kk, h_kv) = arrays, state
        dtype = h_kk.dtype
        decay = chunk_decay(log_decay, segments, chunk_size, dtype)
        qc, kc, vc = (to_chunks(x.astype(dtype), chunk_size) for x in (q, k, v))  # in bf16 x and H would lose what S'x needs
        kk_before, kk_final = chunk_states(kc, kc, decay, h_kk)
        kv_before, kv_final = chunk_states(kc, vc, decay, h_kv)
        mix = to_chunks(alpha.astype(dtype), chunk_size)
        qc = _mixed_queries(qc, kc, mix, decay, kk_before, ridge_strength, num_iter, bp_lambda, solvers[solver])
        o = scale * chunk_outputs(qc, kc, vc, decay, kv_before)
        return from_chunks(o, q.shape[1]).astype(out_dtype), (kk_final, kv_final)

    return scan_blocks(run, (q, k, v, alpha, log_decay), state, segments, chunk_size)
