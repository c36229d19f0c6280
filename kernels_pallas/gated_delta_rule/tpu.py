"""Pallas kernels for TPU: one sweep over the chunks forward, one backward, the state in VMEM.

Forward, a chunk of C rows:

    L = tril(beta K K' M, -1)      A = (I + L)^-1      R = beta (V - reach (K H0))      U = A R

and then linear attention's read and write with U for V. A, U and the state before each chunk are kept for
the backward sweep, which is linear attention's for Q, K, U, and from its dU:

    dR = A' dU       dL = -tril(dR U', -1)       (because U = A R: no further products with A)
    dV = beta dR     dK += dG K + dG' K - beta reach (dR H0'),   dG = beta dL M
    dbeta = rows of dR (V - reach K H0) + dL K K' M              dH -= (beta reach K)' dR

k, v of fewer heads are read once per group, their gradients added up in float32 before they are rounded.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.linear_attention.tpu import read, read_write_backward, write
from kernels_pallas.mosaic import NT, TN, dot, dot_parts, each, head_slices, iota, row_sum, store_heads
from kernels_pallas.operands import operand_dtype, parts

HEADS = 8  # at most this many heads per grid step
BLOCK = 16  # rows of the diagonal blocks that are inverted by substitution


def _diagonal_inverse(L: list[jax.Array]) -> list[jax.Array]:
    """Returns (I + D)^-1, D the 16 x 16 diagonal blocks of each L [C,C], by forward substitution in float32.

    The blocks of a head are stored side by side in [16, C], so that one step applies to all of them: with E_j the
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
    for j in range(BLOCK - 1):
        column = each(lambda l, at=lane - in_block + j: jnp.take_along_axis(l, at, axis=1), packed)
        X = each(lambda x, e, j=j: x - e * x[j : j + 1], X, column)
    return each(lambda x: jnp.where(same, jnp.concatenate([x] * (C // BLOCK), axis=0), 0.0), X)


def unit_lower_inverse(L: list[jax.Array], low: DTypeLike) -> list[jax.Array]:
    """Returns (I + L)^-1 of every strictly lower triangular L [C,C], float32.

    Diagonal blocks by substitution; then doubling, [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]], of
    whose products only the rows of the second block are computed. In bf16 a Newton step with the residual of
    L's two bf16 parts, X + X (I - (I + L) X), takes back what the single passes lost.
    """
    C = L[0].shape[0]
    X = _diagonal_inverse(L)
    lower = each(lambda l: l.astype(low), L)
    size = BLOCK
    while size < C:
        starts = range(size, C, 2 * size)
        shift = size.bit_length() - 1
        block = iota((C // 2, C), 0) >> shift
        left = (iota((C // 2, C), 1) >> shift) == 2 * block  # the columns of A in the row of D

        def corner(x, l, starts=starts, size=size, left=left):
            second = jnp.concatenate([x[b : b + size] for b in starts], axis=0).astype(low)
            return jnp.where(left, dot(second, l), 0.0).astype(low)

        product = each(corner, X, lower)
        product = each(lambda p, x: dot(p, x.astype(low)), product, X)

        def put(x, p, starts=starts, size=size):
            blocks = [(x[b - size : b], x[b : b + size] - p[n * size : (n + 1) * size]) for n, b in enumerate(starts)]
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
        state[...] = initial[0]

    low = k.dtype
    Q, K, V = (head_slices(x, heads, n) for x, n in zip((q, k, v), (1, *groups), strict=True))
    decay, beta = mosaic.chunk_scalars(rows, heads, packed, further=1)
    H0 = [state[h] for h in range(heads)]
    H0_low = each(lambda h: h.astype(low), H0)
    C = K[0].shape[0]
    strict = iota((C, C), 0) > iota((C, C), 1)
    L = each(lambda k, d, b: jnp.where(strict, b * dot(k, k, NT) * d.mask, 0.0), K, decay, beta)
    R = each(lambda k, v, h, d, b: (b * (v - d.reach * dot(k, h))).astype(low), K, V, H0_low, decay, beta)
    A = each(lambda a: a.astype(low), unit_lower_inverse(L, low))
    U = each(lambda a, r: dot(a, r).astype(low), A, R)
    if saved:
        before, inverse, update = saved
        for h in range(heads):
            before[0, 0, h] = H0_low[h]
        store_heads(inverse, A)
        store_heads(update, U)
    store_heads(o, read(Q, K, U, H0_low, decay), scale)
    for h, H1 in enumerate(write(K, U, H0, decay)):
        state[h] = H1

    @pl.when(last)
    def _():
        final[0] = state[...]


def _backward_kernel(
    q, k, v, rows, before, inverse, update, do, dfinal, dq, dk, dv, dscalars, dinitial, state, *, heads, groups, scale, packed
):
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        state[...] = dfinal[0] / scale

    low = k.dtype
    Q, K, V = (head_slices(x, heads, n) for x, n in zip((q, k, v), (1, *groups), strict=True))
    A, U, dO = (head_slices(x, heads) for x in (inverse, update, do))
    decay, beta = mosaic.chunk_scalars(rows, heads, packed, further=1)
    H0, dH = [before[0, 0, h] for h in range(heads)], [state[h] for h in range(heads)]
    dQ, dK, dU, dH0, column, row = read_write_backward(Q, K, U, H0, dO, dH, decay, low)
    store_heads(dq, dQ, scale)

    dR = each(lambda a, u: dot(a, u.astype(low), TN), A, dU)
    store_heads(dv, each(lambda b, r: b * r, beta, dR), scale, groups[1])
    dR_low = each(lambda r: r.astype(low), dR)
    C = K[0].shape[0]
    strict = iota((C, C), 0) > iota((C, C), 1)
    dL = each(lambda r, u: jnp.where(strict, -dot(r, u, NT), 0.0), dR_low, U)
    G = each(lambda k, d: dot(k, k, NT) * d.mask, K, decay)
    across = each(lambda r, h, d: d.reach * dot(r, h, NT), dR_low, H0, decay)
    E = each(jnp.multiply, dL, G)
    dG = each(lambda l, b, d: (b * l * d.mask).astype(low), dL, beta, decay)
    dK = each(lambda a, g, k, x, b: a + dot(g, k) + dot(g, k, TN) - b * x, dK, dG, K, across, beta)
    store_heads(dk, dK, scale, groups[0])
    across = each(lambda x, k: row_sum(x * k), across, K)
    erow = each(row_sum, E)
    dbeta = each(lambda r, v, x, e: row_sum(r * v) - x + e, dR, V, across, erow)
    column = each(lambda c, e, x, b: c + b * (e - x), column, erow, across, beta)
    row = each(lambda r, e, b: r - jnp.sum(b * e, axis=0, keepdims=True), row, E, beta)
    mosaic.store_rows(dscalars, [*column, *dbeta], row, scale)
    for h in range(heads):
        state[h] = dH0[h] - dot((beta[h] * decay[h].reach * K[h]).astype(low), dR_low[h], TN)

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
            (grid.tokens_shape(grid.C, k.dtype), grid.tokens(grid.C)),
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
        [pltpu.VMEM((grid.heads, grid.K, grid.V), jnp.float32)],
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
            (inverse, grid.tokens(grid.C)),
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
