"""The recurrence, token by token, with the solve on explicit matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import States
from kernels_pallas.gated_kalmanet.chebyshev import inverse
from kernels_pallas.gated_kalmanet.solvers import SOLVERS
from kernels_pallas.linear_attention.reference import linear_attention_update, scan_tokens
from kernels_pallas.numerics import safe_sqrt


def _frobenius(H: jax.Array) -> jax.Array:
    """Returns |H|_F [B, H] of H [B, H, K, K], also where the squares of weak states do not fit the dtype."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(H), axis=(-2, -1)))
    H = H * inverse(largest)[..., None, None]
    return largest * safe_sqrt(jnp.sum(H * H, axis=(-2, -1)))


@differentiable(2, 3, 4, 5)
def ridge_solve(
    H: jax.Array,  # [B, H, K, K], symmetric and positive semidefinite
    q: jax.Array,  # [B, H, K]
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: str,
) -> jax.Array:
    """Returns x ~ (H + ridge_strength |H|_F I)^-1 q [B, H, K] by the named solver; its gradient is the implicit one."""
    matvec = functools.partial(jnp.einsum, "bhij,bhj->bhi", H, precision="highest")
    return SOLVERS[solver](matvec, q, _frobenius(H), ridge_strength, num_iter)


def _solve_fwd(H, q, ridge_strength, num_iter, bp_lambda, solver):
    x = ridge_solve(H, q, ridge_strength, num_iter, bp_lambda, solver)
    return x, (H, x)


def _solve_bwd(ridge_strength, num_iter, bp_lambda, solver, residuals, dx):
    """w = (H + lambda)^-1 dx;  dq = w;  dH = -(w x' + x w') / 2;  dlambda = -w'x."""
    H, x = residuals
    w = ridge_solve(H, dx, ridge_strength, num_iter, bp_lambda, solver)
    outer = w[..., :, None] * x[..., None, :]
    dH = -0.5 * (outer + jnp.swapaxes(outer, -1, -2))
    if bp_lambda:
        _, pull = jax.vjp(_frobenius, H)
        dH = dH + pull(-ridge_strength * jnp.sum(w * x, axis=-1))[0]
    return dH, w


ridge_solve.defvjp(_solve_fwd, _solve_bwd)


def gated_kalmanet_update(
    q: jax.Array,  # [B, H, K]
    k: jax.Array,  # [B, H, K]
    v: jax.Array,  # [B, H, V]
    alpha: jax.Array,  # [B, H]
    g: jax.Array,  # [B, H]
    state: States,
    scale: float,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: str,
) -> tuple[jax.Array, States]:
    """Returns (o [B, H, V], the states) after one token."""
    h_kk, h_kv = state
    h_kk = jnp.exp(g)[..., None, None] * h_kk + k[..., :, None] * k[..., None, :]
    if num_iter:
        x = ridge_solve(h_kk, q, ridge_strength, num_iter, bp_lambda, solver)
        q = q + alpha[..., None] * (x - q)
    o, h_kv = linear_attention_update(q, k, v, g, h_kv, scale)
    return o, (h_kk, h_kv)


def gated_kalmanet_reference(
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
) -> tuple[jax.Array, States]:
    """The `reference` implementation of `gated_kalmanet`; see `kernels_pallas.contract`."""
    del chunk_size
    arrays = [x.astype(state[0].dtype) for x in (q, k, v, alpha, log_decay)]

    options = dict(scale=scale, ridge_strength=ridge_strength, num_iter=num_iter, bp_lambda=bp_lambda, solver=solver)
    update = functools.partial(gated_kalmanet_update, **options)

    o, state = scan_tokens(update, arrays, segments, state)
    return o.astype(v.dtype if precision == "fast" else o.dtype), state
