"""Pallas kernels for TPU: decays, norms, the solve and the readout of a chunk in one grid step.

`tpu_solve.py` has the solve, `tpu_norms.py` the norms, `tpu_backward.py` the gradient's kernel.

The gradient is the implicit one (`chunked.py`): w = (H + lambda I)^-1 dx by the same solve; then H x, as linear
attention with q = x, k = v = K, pulls -w back, and lambda's share goes through |H|_F.

`beta` multiplies every head's keys and values, which may be of fewer heads, once they are read: K = beta k and V = beta v,
rounded. From the gradients of K and V then

    dbeta = rows of dK k + dV v,      dk = sum over a group of beta dK,      dv likewise, in float32
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic, mosaic_chunk
from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import States
from kernels_pallas.gated_kalmanet.chebyshev import coefficients
from kernels_pallas.gated_kalmanet.solvers import schedule_for
from kernels_pallas.gated_kalmanet.tpu_backward import backward_kernel, blend, gated_tokens
from kernels_pallas.gated_kalmanet.tpu_norms import inverse_norms
from kernels_pallas.gated_kalmanet.tpu_solve import Plan, Scratch, scratch_of, solve
from kernels_pallas.mosaic_chunk import dot_parts, each, head_columns, store_heads
from kernels_pallas.operands import operand_dtype, parts

HEADS = 8  # at most this many heads per grid step


def _read(query, K, V, S, decay, low, n) -> list[jax.Array]:
    """Returns linear attention's read [C,V] with a float32 query in n parts: x is large where H is small, and S'x cancels."""
    scores = each(lambda q, k, d: parts(dot_parts((k,), parts(q, low, n)) * d.mask, low, n), query, K, decay)
    reached = each(lambda q, d: parts(d.reach * q, low, n), query, decay)

    def rows(x):
        return tuple(map(jnp.transpose, x))

    across = each(lambda q, s: dot_parts(rows(q), parts(s, low, n)), reached, S)
    return each(lambda a, s, v: a + dot_parts(rows(s), (v,)), across, scores, V)


def _write(K, V, S, decay, low, n) -> list[jax.Array]:
    """Returns linear attention's write, with keep K' in n parts: an error of H is an error of every later x."""
    update = each(lambda k, v, d: dot_parts(parts(d.keep * k, low, n), (v,)), K, V, decay)
    return each(lambda s, u, d: d.total * s + u, S, update, decay)


def _forward_kernel(
    omegas,
    q,
    k,
    v,
    rows,
    initial_kk,
    initial_kv,
    o,
    final_kk,
    final_kv,
    *rest,
    heads,
    groups,
    gated,
    scale,
    packed,
    plan,
    precise,
):
    saved, buffers = rest[: -len(Scratch._fields)], rest[-len(Scratch._fields) :]
    kk, kv = final_kk.at[0], final_kv.at[0]  # in VMEM until the last chunk is done

    @pl.when(pl.program_id(2) == 0)
    def _():
        kk[...], kv[...] = initial_kk[0], initial_kv[0]

    low = k.dtype
    n = 3 if precise else 2  # as many bf16 parts as a float32 has, or two
    decay, scalars = mosaic_chunk.chunk_scalars(rows, heads, packed, further=1 + gated)
    alpha, beta = scalars[:heads], scalars[heads:]
    query = rhs = each(lambda x: x.astype(jnp.float32), head_columns(q, heads))
    Kt, K, V = gated_tokens(k, v, beta, heads, groups)
    H0, S0 = [kk[h] for h in range(heads)], [kv[h] for h in range(heads)]
    if plan.num_iter:
        of_norms = inverse_norms(K, Kt, H0, decay, low, n)
        X = solve(rhs, K, Kt, H0, decay, of_norms[0], omegas, Scratch(*buffers), low, plan)
        query = blend(rhs, X, alpha)
    if saved:
        kk_before, kv_before, solution, norms = saved
        for h in range(heads):
            kk_before[0, 0, h], kv_before[0, 0, h] = H0[h], S0[h]
            if plan.num_iter:
                solution[0, 0, h] = X[h]
        if plan.num_iter:
            norms[0, 0, 0] = mosaic_chunk.stack_rows(sum(of_norms, []), norms.shape[3])
    store_heads(o, _read(query, K, V, S0, decay, low, n), scale)
    for h, (H1, S1) in enumerate(zip(_write(Kt, K, H0, decay, low, n), _write(Kt, V, S0, decay, low, n), strict=True)):
        kk[h], kv[h] = H1, S1


class Options(NamedTuple):
    """The options that are Python values, known when a kernel is built."""

    scale: float
    plan: Plan
    bp_lambda: bool
    precise: bool
    out_dtype: jnp.dtype


def gated_kalmanet_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None,
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
    """The `pallas_tpu` implementation of `gated_kalmanet`; see `kernels_pallas.contract`."""
    del chunk_size
    low = operand_dtype(q, k, v)
    precise = precision == "accurate"
    out_dtype = jnp.dtype(jnp.float32 if precise else v.dtype)
    options = Options(
        scale, Plan(solver, ridge_strength, num_iter, schedule_for(solver, precision, num_iter)), bp_lambda, precise, out_dtype
    )
    arrays = (x.astype(low) for x in (q, *mosaic.complete_groups(q, k, v, HEADS)))
    return _gated_kalmanet(*arrays, alpha, log_decay, beta, state, segments, options)


@differentiable(8)
def _gated_kalmanet(q, k, v, alpha, log_decay, beta, state, segments, options) -> tuple[jax.Array, States]:
    return _run_forward(q, k, v, alpha, log_decay, beta, state, segments, options, save=False)[0]


def _prepare(q, k, v, alpha, log_decay, beta, segments, options, reverse=False):
    """Returns the grid, the first inputs of both kernels, and their static arguments."""
    omegas = jnp.asarray(coefficients(options.plan.ridge_strength, max(options.plan.num_iter, 1)))
    groups = mosaic.groups_of(q, k, v)
    grid = mosaic.grid_of(q, v, HEADS, reverse, groups)
    scalars = (alpha,) if beta is None else (alpha, beta)
    rows = mosaic.chunk_rows(log_decay, segments, grid.C, grid.heads, *scalars)
    static = dict(
        heads=grid.heads,
        groups=groups,
        gated=beta is not None,
        scale=options.scale,
        packed=segments is not None,
        plan=options.plan,
    )
    return grid, [(omegas, pl.BlockSpec(memory_space=pltpu.SMEM)), *mosaic.token_inputs(grid, q, k, v, rows)], static


def _run_forward(q, k, v, alpha, log_decay, beta, state, segments, options, save):
    (_, T, H, K), V = q.shape, v.shape[-1]
    grid, inputs, static = _prepare(q, k, v, alpha, log_decay, beta, segments, options)
    values = grid.tokens(grid.V)
    kk, kv = grid.state(grid.K, grid.K), grid.state(grid.K, grid.V)
    outputs = [
        (grid.tokens_shape(grid.V, options.out_dtype), values),
        (grid.state_shape(grid.K, grid.K), kk),
        (grid.state_shape(grid.K, grid.V), kv),
    ]
    if save:
        R = mosaic.row_count(3 * grid.heads)
        outputs += [
            (grid.states_shape(grid.K, grid.K, jnp.float32), grid.states(grid.K, grid.K)),
            (grid.states_shape(grid.K, grid.V, jnp.float32), grid.states(grid.K, grid.V)),
            (grid.states_shape(grid.K, grid.C, jnp.float32), grid.states(grid.K, grid.C)),
            (grid.rows_shape(R), grid.rows(R)),
        ]
    o, h_kk, h_kv, *saved = mosaic.run(
        functools.partial(_forward_kernel, **static, precise=options.precise),
        grid,
        "gated_kalmanet_forward",
        [*inputs, (mosaic.pad_state(state[0]), kk), (mosaic.pad_state(state[1]), kv)],
        outputs,
        scratch_of(grid, k.dtype, options.plan),
    )
    return (mosaic.head_tokens(o, T, H, V), (h_kk[:, :, :K, :K], h_kv[:, :, :K, :V])), saved


def _vjp_forward(q, k, v, alpha, log_decay, beta, state, segments, options):
    out, saved = _run_forward(q, k, v, alpha, log_decay, beta, state, segments, options, save=True)
    return out, (q, k, v, alpha, log_decay, beta, segments, saved)


def _vjp_backward(options, residuals, cotangents):
    q, k, v, alpha, log_decay, beta, segments, (kk_before, kv_before, solution, norms) = residuals
    do, (dfinal_kk, dfinal_kv) = cotangents
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    grid, inputs, static = _prepare(q, k, v, alpha, log_decay, beta, segments, options, reverse=True)
    values = grid.tokens(grid.V)
    kk, kv = grid.state(grid.K, grid.K), grid.state(grid.K, grid.V)
    dq, dk, dv, dscalars, dinitial_kk, dinitial_kv = mosaic.run(
        functools.partial(backward_kernel, **static, bp_lambda=options.bp_lambda),
        grid,
        "gated_kalmanet_backward",
        [
            *inputs,
            (kk_before, grid.states(grid.K, grid.K)),
            (kv_before, grid.states(grid.K, grid.V)),
            (solution, grid.states(grid.K, grid.C)),
            (norms, grid.rows(norms.shape[3])),
            (mosaic.flat_tokens(do, grid.C), values),
            (mosaic.pad_state(dfinal_kk), kk),
            (mosaic.pad_state(dfinal_kv), kv),
        ],
        [
            *mosaic.gradient_outputs(grid, q, k, v, 2 if beta is None else 3),
            (grid.state_shape(grid.K, grid.K), kk),
            (grid.state_shape(grid.K, grid.V), kv),
        ],
        [
            pltpu.VMEM((grid.heads, grid.K, grid.K), jnp.float32),
            pltpu.VMEM((grid.heads, grid.K, grid.V), jnp.float32),
            *scratch_of(grid, k.dtype, options.plan),
        ],
    )
    of_scalar = functools.partial(mosaic.from_rows, dscalars, grid.heads, T)
    return (
        *mosaic.token_gradients(dq, dk, dv, q, v),
        of_scalar(kind=1).astype(alpha.dtype),
        mosaic.decay_gradient(dscalars, grid.heads, T).astype(log_decay.dtype),
        None if beta is None else of_scalar(kind=2).astype(beta.dtype),
        (dinitial_kk[:, :, :K, :K], dinitial_kv[:, :, :K, :V]),
        None,
    )


_gated_kalmanet.defvjp(_vjp_forward, _vjp_backward)
