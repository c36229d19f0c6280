"""Pallas kernels for TPU: one sweep over the chunks forward, one backward, the state in VMEM.

Forward, a chunk of C rows:

    L = tril(beta K K' M, -1)      A = (I + L)^-1      R = beta (V - reach (K H0))      U = A R

and then linear attention's read and write with U for V. A, U and the state before each chunk are kept for
the backward sweep, which is linear attention's for Q, K, U, and from its dU:

    dR = A' dU       dL = -tril(dR U', -1)       (because U = A R: no further products with A)
    dV = beta dR     dK += dG K + dG' K - beta reach (dR H0'),   dG = beta dL M
    dbeta = rows of dR (V - reach K H0) + dL K K' M              dH -= (beta reach K)' dR

k, v of fewer heads are read once per group, their gradients added up in float32 before they are rounded.

The kernels compute the transposes of these arrays, with the tokens in lanes (`mosaic_chunk.py`): L' and A' are upper triangular.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import mosaic, mosaic_chunk
from kernels_pallas.arguments import differentiable
from kernels_pallas.linear_attention.tpu import Tokens, read, read_write_backward, write
from kernels_pallas.mosaic_chunk import (
    NT,
    column_sum,
    dot,
    dot_parts,
    each,
    earlier,
    head_columns,
    head_slices,
    iota,
    store_tokens,
    sums_of_rows,
)
from kernels_pallas.operands import operand_dtype, parts

HEADS = 8  # at most this many heads per grid step
BLOCK = 8  # rows of the diagonal blocks that are inverted by substitution


def _diagonal_inverse(L: list[jax.Array]) -> list[jax.Array]:
    """Returns (I + D)^-1, D the 8 x 8 diagonal blocks of each strictly upper triangular L [C,C], by substitution in float32.

    The blocks of a head are stored side by side in [8, C], so that one step applies to all of them: with E_j the
    j-th column of every block spread over its block, X <- X - E_j (row j of X).
    """
    C = L[0].shape[0]
    same = (iota((C, C), 0) // BLOCK) == (iota((C, C), 1) // BLOCK)

    def side_by_side(l):
        l = jnp.where(same, l, 0.0)
        return sum(l[b : b + BLOCK] for b in range(BLOCK, C, BLOCK)) + l[:BLOCK]

    packed = each(side_by_side, L)
    row, lane = iota((BLOCK, C), 0), iota((BLOCK, C), 1)
    in_block = lane & (BLOCK - 1)
    X = [jnp.where(row == in_block, 1.0, 0.0)] * len(L)
    for j in reversed(range(1, BLOCK)):
        column = each(lambda l, at=lane - in_block + j: jnp.take_along_axis(l, at, axis=1), packed)
        X = each(lambda x, e, j=j: x - e * x[j : j + 1], X, column)
    return each(lambda x: jnp.where(same, jnp.concatenate([x] * (C // BLOCK), axis=0), 0.0), X)


def unit_upper_inverse(L: list[jax.Array], low: DTypeLike) -> list[jax.Array]:
    """Returns (I + L)^-1 of every strictly upper triangular L [C,C], float32.

    Diagonal blocks by substitution; then doubling, [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]], of
    whose products only the rows of the first block are computed. In bf16 a Newton step with the residual of
    L's two bf16 parts, X + X (I - (I + L) X), takes back what the single passes lost.
    """
    C = L[0].shape[0]
    X = _diagonal_inverse(L)
    upper = each(lambda l: l.astype(low), L)
    size = BLOCK
    while size < C:
        starts = range(0, C, 2 * size)
        shift = size.bit_length() - 1
        block = iota((C // 2, C), 0) >> shift
        right = (iota((C // 2, C), 1) >> shift) == 2 * block + 1  # the columns of D in the rows of A

        def corner(x, l, starts=starts, size=size, right=right):
            first = jnp.concatenate([x[b : b + size] for b in starts], axis=0).astype(low)
            return jnp.where(right, dot(first, l), 0.0).astype(low)

        product = each(corner, X, upper)
        product = each(lambda p, x: dot(p, x.astype(low)), product, X)

        def put(x, p, starts=starts, size=size):
            blocks = [(x[b : b + size] - p[n * size : (n + 1) * size], x[b + size : b + 2 * size]) for n, b in enumerate(starts)]
            return jnp.concatenate([b for pair in blocks for b in pair], axis=0)

        X = each(put, X, product)
        size *= 2
    if low == jnp.float32:
        return X
    identity = jnp.where(iota((C, C), 0) == iota((C, C), 1), 1.0, 0.0)
    X = each(lambda x: x.astype(low), X)

    def residual(l, x):
        return (identity - x.astype(jnp.float32) - dot_parts(parts(l, low), (x,))).astype(low)

    correction = each(residual, L, X)
    return each(lambda x, r: x.astype(jnp.float32) + dot(x, r), X, correction)


def _forward_kernel(q, k, v, rows, initial, o, final, *rest, heads, groups, scale, packed):
    *saved, state = rest
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        for h in range(heads):
            state[h] = initial[0, h].T

    low = k.dtype
    Q, K, V = head_slices(q, heads), head_slices(k, heads, groups[0]), head_columns(v, heads, groups[1])
    decay, beta = mosaic_chunk.chunk_scalars(rows, heads, packed, further=1)
    S = [state[h] for h in range(heads)]
    S_low = each(lambda s: s.astype(low), S)
    L = each(lambda k, d, b: earlier(dot(k, k, NT) * d.mask * b), K, decay, beta)
    R = each(lambda k, v, s, d, b: (b * (v - d.reach * dot(s, k, NT))).astype(low), K, V, S_low, decay, beta)
    A = each(lambda a: a.astype(low), unit_upper_inverse(L, low))
    U = each(dot, R, A)
    U_low = each(lambda u: u.astype(low), U)
    if saved:
        states, inverse, update = saved
        for h in range(heads):
            states[0, 0, h] = S_low[h].T
        for h, a in enumerate(A):
            inverse[0, 0, h] = a
        store_tokens(update, U_low)
    store_tokens(o, read(Q, K, U_low, S_low, decay), scale)
    for h, new in enumerate(write(K, U, S, decay)):
        state[h] = new

    @pl.when(last)
    def _():
        for h in range(heads):
            final[0, h] = state[h].T


def _backward_kernel(
    q, k, v, rows, states, inverse, update, do, dfinal, dq, dk, dv, dscalars, dinitial, state, *, heads, groups, scale, packed
):
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        state[...] = dfinal[0] / scale

    low = k.dtype
    K, U, dO = head_slices(k, heads, groups[0]), head_slices(update, heads), head_slices(do, heads)
    V = head_columns(v, heads, groups[1])
    A, S, dS = ([ref[h] for h in range(heads)] for ref in (inverse.at[0, 0], states.at[0, 0], state))
    decay, beta = mosaic_chunk.chunk_scalars(rows, heads, packed, further=1)
    tokens = Tokens(head_columns(q, heads), K, head_columns(k, heads, groups[0]), U, dO, head_columns(do, heads))
    found = read_write_backward(tokens, S, dS, decay, low)
    store_tokens(dq, [g.dQ for g in found], scale)

    dR = each(lambda g, a: dot(g.dV.astype(low), a, NT), found, A)
    store_tokens(dv, each(jnp.multiply, beta, dR), scale, groups[1])
    dR_low = each(lambda r: r.astype(low), dR)
    dL = each(lambda u, r: -earlier(dot(u, r)), U, dR_low)
    G = each(lambda k, d: dot(k, k, NT) * d.mask, K, decay)
    across = each(lambda s, r, d: d.reach * dot(s, r), S, dR_low, decay)
    dG = each(lambda l, b, d: (b * l * d.mask).astype(low), dL, beta, decay)
    dK = each(lambda f, g, k, x, b: f.dK + dot(k, g) + dot(k, g, NT) - b * x, found, dG, tokens.Kt, across, beta)
    store_tokens(dk, dK, scale, groups[0])
    across = each(lambda x, k: column_sum(x * k), across, tokens.Kt)
    pairs = each(jnp.multiply, dL, G)
    dbeta = each(lambda r, v, x, p: column_sum(r * v) - x + column_sum(p), dR, V, across, pairs)
    pairs = each(lambda f, p, b: f.pairs + b * p, found, pairs, beta)
    da = each(lambda f, p, x, b, lost: f.da + column_sum(p) - b * x - lost, found, pairs, across, beta, sums_of_rows(pairs))
    mosaic_chunk.store_rows(dscalars, [*da, *dbeta], scale)
    for h in range(heads):
        through = (beta[h] * decay[h].reach * tokens.Kt[h]).astype(low)
        state[h] = found[h].dS - dot(through, dR_low[h], NT)

    @pl.when(last)
    def _():
        dinitial[0] = scale * state[...]


def gated_delta_rule_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `gated_delta_rule`; see `kernels_pallas.contract`."""
    del chunk_size
    low = operand_dtype(q, k, v)
    arrays = (x.astype(low) for x in (q, *mosaic.complete_groups(q, k, v, HEADS)))
    o, final = _gated_delta_rule(*arrays, log_decay, beta, state, segments, scale)
    return o.astype(v.dtype), final


@differentiable(7)
def _gated_delta_rule(q, k, v, log_decay, beta, state, segments, scale) -> tuple[jax.Array, jax.Array]:
    return _run_forward(q, k, v, log_decay, beta, state, segments, scale, save=False)[0]


def _run_forward(q, k, v, log_decay, beta, state, segments, scale, save):
    (_, T, H, _), (K, V) = q.shape, state.shape[2:]
    groups = mosaic.groups_of(q, k, v)
    grid = mosaic.grid_of(q, v, HEADS, groups=groups)
    rows = mosaic.chunk_rows(log_decay, segments, grid.C, grid.heads, beta)
    values, carried = grid.tokens(grid.V), grid.state(grid.K, grid.V)
    outputs = [(grid.tokens_shape(grid.V, v.dtype), values), (grid.state_shape(grid.K, grid.V), carried)]
    if save:
        outputs += [
            (grid.states_shape(grid.K, grid.V, k.dtype), grid.states(grid.K, grid.V)),
            (grid.states_shape(grid.C, grid.C, k.dtype), grid.states(grid.C, grid.C)),
            (grid.tokens_shape(grid.V, k.dtype), values),
        ]
    o, final, *saved = mosaic.run(
        functools.partial(_forward_kernel, heads=grid.heads, groups=groups, scale=scale, packed=segments is not None),
        grid,
        "gated_delta_rule_forward",
        [
            *mosaic.token_inputs(grid, q, k, v, rows),
            (mosaic.pad_state(state), carried),
        ],
        outputs,
        [pltpu.VMEM((grid.heads, grid.V, grid.K), jnp.float32)],
    )
    return (mosaic.head_tokens(o, T, H, V), final[:, :, :K, :V]), saved


def _vjp_forward(q, k, v, log_decay, beta, state, segments, scale):
    out, saved = _run_forward(q, k, v, log_decay, beta, state, segments, scale, save=True)
    return out, (q, k, v, log_decay, beta, segments, saved)


def _vjp_backward(scale, residuals, cotangents):
    q, k, v, log_decay, beta, segments, (before, inverse, update) = residuals
    do, dfinal = cotangents
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    groups = mosaic.groups_of(q, k, v)
    grid = mosaic.grid_of(q, v, HEADS, reverse=True, groups=groups)
    rows = mosaic.chunk_rows(log_decay, segments, grid.C, grid.heads, beta)
    values, carried = grid.tokens(grid.V), grid.state(grid.K, grid.V)
    dq, dk, dv, dscalars, dinitial = mosaic.run(
        functools.partial(_backward_kernel, heads=grid.heads, groups=groups, scale=scale, packed=segments is not None),
        grid,
        "gated_delta_rule_backward",
        [
            *mosaic.token_inputs(grid, q, k, v, rows),
            (before, grid.states(grid.K, grid.V)),
            (inverse, grid.states(grid.C, grid.C)),
            (update, values),
            (mosaic.flat_tokens(do, grid.C), values),
            (mosaic.pad_state(dfinal), carried),
        ],
        [
            *mosaic.gradient_outputs(grid, q, k, v, 2),
            (grid.state_shape(grid.K, grid.V), carried),
        ],
        [pltpu.VMEM((grid.heads, grid.K, grid.V), jnp.float32)],
    )
    return (
        *mosaic.token_gradients(dq, dk, dv, q, v),
        mosaic.decay_gradient(dscalars, grid.heads, T).astype(log_decay.dtype),
        mosaic.from_rows(dscalars, grid.heads, T, kind=1).astype(beta.dtype),
        dinitial[:, :, :K, :V],
        None,
    )


_gated_delta_rule.defvjp(_vjp_forward, _vjp_backward)
