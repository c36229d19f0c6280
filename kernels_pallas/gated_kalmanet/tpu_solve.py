"""The solve of a chunk for the TPU kernels: x ~ (H + lambda I)^-1 q for every token at once, with the tokens in lanes.

Both iterations keep the residual r = q - (H + lambda I) x and move x along a direction d. The Chebyshev iteration of
`chebyshev.py` is then

    r <- r - (H + lambda I) d,      d <- (omega - 1) d + omega r,      x <- x + d

and conjugate gradients are those of `conjugate_gradients.py`, whose p is d. In exact arithmetic nothing changes. In bf16 it
is much better: d is rounded to bf16 before it is used AND before it is added to x, so r stays the residual of x and what the
rounding changed is corrected by the iterations that follow. What remains are the roundings of the matrix, H0 and (d K') M,
whose effect shrinks with d: the first iterations carry those two in two bf16 parts each (5 passes of the matrix unit an
iteration), the later ones in one (3 passes). The accurate schedule of Chebyshev also keeps d in two parts (7 and 5 passes).

Vectors are columns: x, r and d of a head are [K, C], so one product with [K; H0] is the first half of an iteration for all
tokens, and what a token has one of is a row [1, C]: a sum over a token's vector adds registers and needs no shuffle. The
equation is divided by `unit_of` |H|, and the right-hand side by its largest entry, token by token.

An iteration has three stages, which wait for one another: the product with [K; H0], the product of K' with the scores, and
the update of the vectors. The heads are in groups that take turns, each one stage behind the next: while one group's vectors
are updated, the matrix unit multiplies for others. A loop does not interrupt this: what is between two stages when its body
ends is kept in VMEM.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas.arguments import backend
from kernels_pallas.gated_kalmanet.conjugate_gradients import LEAST
from kernels_pallas.gated_kalmanet.solvers import SMALLEST, unit_of
from kernels_pallas.mosaic import Grid
from kernels_pallas.mosaic_chunk import Decay, column_sum, dot, dot_parts, each
from kernels_pallas.operands import parts

GROUPS = 4
# Iterations of a loop's body. The compiler schedules conjugate gradients in a loop a third longer than in a straight line,
# whatever is in the body, so both phases of the default schedule are straight lines.
UNROLL = {"chebyshev": 4, "cg": 12}


class Plan(NamedTuple):
    """How a kernel solves: `schedule` is that of `solvers.schedule_for`."""

    solver: str
    ridge_strength: float
    num_iter: int
    schedule: tuple[int, tuple[tuple[int, int], ...]]


class Scratch(NamedTuple):
    """References in VMEM: x, r, d and |r|^2 (of conjugate gradients) of every head, and what a group keeps between the stages."""

    x: jax.Ref
    r: jax.Ref
    d: jax.Ref
    squared: jax.Ref
    scores: jax.Ref
    across: jax.Ref
    moved: jax.Ref


def groups_of(heads: int) -> list[list[int]]:
    """Returns the heads of every group. At least two groups take turns: for one head, the second is empty."""
    size = max(1, heads // GROUPS)
    groups = [list(range(first, min(first + size, heads))) for first in range(0, heads, size)]
    return groups if len(groups) > 1 else [*groups, []]


def scratch_of(grid: Grid, low: DTypeLike, plan: Plan) -> list:
    """Returns the buffers of `Scratch`."""
    size = max(map(len, groups_of(grid.heads)))
    step = jnp.dtype(low if plan.schedule[0] == 1 else jnp.float32)
    vectors, between = (grid.heads, grid.K, grid.C), (size, grid.K, grid.C)
    return [
        pltpu.VMEM(vectors, jnp.float32),
        pltpu.VMEM(vectors, jnp.float32),
        pltpu.VMEM(vectors, step),
        pltpu.VMEM((grid.heads, 8, grid.C), jnp.float32),
        pltpu.VMEM((size, grid.C, grid.C), jnp.float32),
        pltpu.VMEM(between, jnp.float32),
        pltpu.VMEM(between, jnp.float32),
    ]


def solve(
    rhs: Sequence[jax.Array],
    K: Sequence[jax.Array],
    Kt: Sequence[jax.Array],
    H0: Sequence[jax.Array],
    decay: Sequence[Decay],
    inverse_norm: Sequence[jax.Array],
    omegas: jax.Ref,
    scratch: Scratch,
    low: DTypeLike,
    plan: Plan,
) -> list[jax.Array]:
    """Returns x ~ (H + lambda I)^-1 rhs [K,C] in float32 for every head.

    Args:
      rhs: float32 [K,C].
      K, Kt: the keys in rows [C,K] and with the tokens in lanes [K,C], in `low`.
      H0: float32 [K,K], symmetric.
      inverse_norm: 1 / |H|_F as rows [1,C], 0 where the state is empty, and so is x there.
      omegas: SMEM reference of `chebyshev.coefficients`.
      low: the dtype of the products' operands.
    """
    heads, (C, D) = range(len(K)), K[0].shape
    groups, (direction, passes) = groups_of(len(K)), plan.schedule
    unit = unit_of(plan.solver, plan.ridge_strength)
    ridge = plan.ridge_strength / unit
    scale = each(lambda n: n * (1 / unit), inverse_norm)
    reach = each(lambda d, s: d.reach * s, decay, scale)
    mask = each(lambda d, s: d.mask * s, decay, scale)
    most = max(count for _, count in (*passes, (0, 1)))
    matrix = each(lambda k, h: jnp.concatenate([k, *parts(h, low, most)], axis=0), K, H0)
    most = (matrix[0].shape[0] - C) // D

    def rounded(d) -> Any:
        return sum(p.astype(jnp.float32) for p in parts(d, low, direction))

    def multiply(h, count):
        step = parts(scratch.d[h], low, direction)
        n = max(count, len(step))
        products = [dot(matrix[h][: C + min(count, n - i) * D], d) for i, d in enumerate(step)]
        tail = [p[at : at + D] for p in products for at in range(C, p.shape[0], D)]
        return functools.reduce(jnp.add, [p[:C] for p in products]) * mask[h], reach[h] * functools.reduce(jnp.add, tail)

    def finish(h, between, count):
        scores, across = between
        return across + dot_parts((Kt[h],), parts(scores, low, count))

    def keep(h, x, r, d):
        scratch.x[h], scratch.r[h], scratch.d[h] = x, r, d.astype(scratch.d.dtype)

    def chebyshev(h, moved, n):
        d = scratch.d[h].astype(jnp.float32)
        r = scratch.r[h] - (moved + ridge * d)
        d = rounded(omegas[n, 0] * d + omegas[n, 1] * r)
        keep(h, scratch.x[h] + d, r, d)

    def conjugate_gradients(h, moved, n):
        d, old = scratch.d[h].astype(jnp.float32), scratch.squared[h, :1]
        moved = moved + ridge * d
        length = old / jnp.maximum(column_sum(d * moved), LEAST)
        r = scratch.r[h] - length * moved
        scratch.squared[h, :1] = new = column_sum(r * r)
        keep(h, scratch.x[h] + length * d, r, rounded(r + new / jnp.maximum(old, LEAST) * d))

    for h in heads:
        r = rhs[h]
        largest = jnp.max(jnp.abs(r), axis=0, keepdims=True)
        scale[h] = scale[h] * largest
        r = r * (1.0 / jnp.maximum(largest, SMALLEST))
        d = rounded(r)
        keep(h, d if plan.solver == "chebyshev" else jnp.zeros_like(r), r, d)
        if plan.solver == "cg":
            scratch.squared[h, :1] = column_sum(r * r)
    update = chebyshev if plan.solver == "chebyshev" else conjugate_gradients

    def load():
        following = [(scratch.scores[i], scratch.across[i]) for i in range(len(groups[1]))]
        return [scratch.moved[i] for i in range(len(groups[0]))], following

    def store(moved, following):
        for i, x in enumerate(moved):
            scratch.moved[i] = x
        for i, x in enumerate(following):
            scratch.scores[i], scratch.across[i] = x

    def iterate(n, count, moved, following):
        for g, group in enumerate(groups):
            ahead, next_one = groups[(g + 2) % len(groups)], groups[(g + 1) % len(groups)]
            for h, m in zip(group, moved, strict=True):
                update(h, m, n)
            starting = [multiply(h, count) for h in ahead]
            moved, following = [finish(h, b, count) for h, b in zip(next_one, following, strict=True)], starting
        return moved, following

    first, count = 0, min(passes[0][1], most)
    store([finish(h, multiply(h, count), count) for h in groups[0]], [multiply(h, count) for h in groups[1]])
    for iterations, count in (*passes, (plan.num_iter, 1)):
        last, count = min(first + iterations, plan.num_iter), min(count, most)
        unroll = UNROLL[plan.solver] if backend() == "tpu" else 1
        trips = (last - first) // unroll

        def some(start, iterations, count=count):
            between = load()
            for i in range(iterations):
                between = iterate(start + i, count, *between)
            store(*between)

        def body(trip, carry, first=first, unroll=unroll, some=some):
            some(first + trip * unroll, unroll)
            return carry

        if trips:
            jax.lax.fori_loop(0, trips, body, 0)
        if rest := last - first - trips * unroll:
            some(last - rest, rest)
        first = last
    return [scale[h] * scratch.x[h] for h in heads]
