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
from kernels_pallas.mosaic import NT, column_sum, dot, dot_parts, each, head_slices, iota, row_sum, store_heads
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


TRANSPOSE = dict(V="f32", O="b16", U="f32", q="f32", k="f32", do="f32", v="f32", S="f32", dS="f32", dq="f32", dk="f32", dv="f32")


def transpose(x, name=""):
    how = TRANSPOSE[name]
    if how == "mxu" and x.dtype == jnp.bfloat16:
        n = x.shape[1]
        eye = jnp.where(iota((n, n), 0) == iota((n, n), 1), 1.0, 0.0).astype(x.dtype)
        return dot(eye, x, NT).astype(x.dtype)
    if how == "b16":
        return x.T
    return x.astype(jnp.float32).T.astype(x.dtype)


def _forward_kernel(q, k, v, rows, initial, o, final, *rest, heads, groups, scale, packed):
    *saved, state = rest
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        for h in range(heads):
            state[h] = initial[0, h].T

    low = k.dtype
    Q, K, V = (head_slices(x, heads, n) for x, n in zip((q, k, v), (1, *groups), strict=True))
    decay, beta = mosaic.chunk_scalars(rows, heads, packed, further=1, lanes=2)
    beta = [rows[0, 0, 0, 2 * heads + h : 2 * heads + h + 1, :] for h in range(heads)]
    H0 = [state[h] for h in range(heads)]
    H0_low = each(lambda h: h.astype(low), H0)
    C = K[0].shape[0]
    strict = iota((C, C), 0) < iota((C, C), 1)
    L = each(lambda k, d, b: jnp.where(strict, dot(k, k, NT) * d.mask * b, 0.0), K, decay, beta)
    R = each(lambda k, v, h, d, b: (b * (transpose(v, "V").astype(jnp.float32) - d.reach * dot(h, k, NT))).astype(low), K, V, H0_low, decay, beta)
    A = each(lambda a: a.astype(low), unit_upper_inverse(L, low))
    U = each(lambda r, a: dot(r, a), R, A)
    U_low = each(lambda u: u.astype(low), U)
    if saved:
        before, inverse, update = saved
        for h in range(heads):
            before[0, 0, h] = transpose(H0_low[h], "S")
        store_heads(inverse, A)
        store_heads(update, each(lambda u: transpose(u, "U"), U_low))
    scores = each(lambda q, k, d: (dot(k, q, NT) * d.mask).astype(low), Q, K, decay)
    O = each(lambda q, h, d, u, s: d.reach * dot(h, q, NT) + dot(u, s), Q, H0_low, decay, U_low, scores)
    for h in range(heads):
        D = O[h].shape[0]
        o[0, :, h * D : (h + 1) * D] = transpose((scale * O[h]).astype(o.dtype), "O")
    update = each(lambda u, k, d: dot((d.keep * u).astype(low), k), U, K, decay)
    for h in range(heads):
        state[h] = decay[h].total * H0[h] + update[h]

    @pl.when(last)
    def _():
        for h in range(heads):
            final[0, h] = state[h].T


def _store_lanes(ref, values, scale, group, name):
    D = values[0].shape[0]
    for h in range(len(values) // group):
        value = functools.reduce(jnp.add, values[h * group : (h + 1) * group])
        ref[0, :, h * D : (h + 1) * D] = transpose((scale * value).astype(ref.dtype), name)


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
    decay, _ = mosaic.chunk_scalars(rows, heads, packed, further=1, lanes=2)
    beta = [rows[0, 0, 0, 2 * heads + h : 2 * heads + h + 1, :] for h in range(heads)]
    H0, dS = [before[0, 0, h] for h in range(heads)], [state[h] for h in range(heads)]
    Qt, Kt, Vt, dOt = ([transpose(x, n) for x in xs] for n, xs in (("q", Q), ("k", K), ("v", V), ("do", dO)))
    C = K[0].shape[0]
    strict = iota((C, C), 0) < iota((C, C), 1)
    dS_low = each(lambda s: s.astype(low), dS)
    dS_t = each(lambda s: transpose(s, "dS"), dS_low)
    scores = each(lambda k, q, d: dot(k, q, NT) * d.mask, K, Q, decay)
    dscores = each(lambda u, o: dot(u, o, NT), U, dO)
    E = each(lambda s, ds: s * ds, scores, dscores)
    dscores = each(lambda ds, d: (ds * d.mask).astype(low), dscores, decay)
    scores = each(lambda s: s.astype(low), scores)
    dU = each(lambda o, s, h, k, d: (dot(o, s, NT) + d.keep * dot(h, k, NT)).astype(low), dOt, scores, dS_t, K, decay)
    dR = each(lambda u, a: dot(u, a, NT), dU, A)
    _store_lanes(dv, each(jnp.multiply, beta, dR), scale, groups[1], "dv")
    dR_low = each(lambda r: r.astype(low), dR)
    kept = each(lambda h, u, d: d.keep * dot(h, u, NT), dS_low, U, decay)
    across = each(lambda h, o, d: d.reach * dot(h, o, NT), H0, dO, decay)
    _store_lanes(dq, each(lambda a, k, ds: a + dot(k, ds), across, Kt, dscores), scale, 1, "dq")
    dL = each(lambda u, r: -dot(u, r), U, dR_low)
    X = each(lambda h, r, d: d.reach * dot(h, r), H0, dR_low, decay)
    G = each(lambda k, d: dot(k, k, NT) * d.mask, K, decay)
    F = each(lambda l, g: jnp.where(strict, l * g, 0.0), dL, G)
    dG = each(lambda l, b, d: jnp.where(strict, b * l * d.mask, 0.0).astype(low), dL, beta, decay)
    dK = each(lambda a, q, ds, k, g, x, b: a + dot(q, ds, NT) + dot(k, g, NT) + dot(k, g) - b * x, kept, Qt, dscores, Kt, dG, X, beta)
    _store_lanes(dk, dK, scale, groups[0], "dk")
    E = each(lambda e, f, b: jnp.where(strict, e, 0.0) + b * f, E, F, beta)
    x = each(lambda x, k: column_sum(x * k), X, Kt)
    kept = each(lambda x, k: column_sum(x * k), kept, Kt)
    dbeta = each(lambda r, v, x, f: column_sum(r * v) - x + column_sum(f), dR, Vt, x, F)
    end = iota((1, C), 1) == C - 1

    def row(e, a, q, x, b, kept, h, h0, d):
        at_end = row_sum(kept) + d.total * row_sum(column_sum(h * h0))
        return column_sum(e) + column_sum(a * q) - b * x - kept + jnp.where(end, at_end, 0.0)

    row = each(row, E, across, Qt, x, beta, kept, dS, H0, decay)
    mosaic.store_rows(dscalars, each(lambda e: -row_sum(e), E), [*row, *dbeta], scale)
    for h in range(heads):
        of_q, of_k = (decay[h].reach * Qt[h]).astype(low), (beta[h] * decay[h].reach * Kt[h]).astype(low)
        state[h] = decay[h].total * dS[h] + dot(of_q, dO[h]) - dot(of_k, dR_low[h], NT)

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
