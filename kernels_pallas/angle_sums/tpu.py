"""Pallas kernels for TPU: one sweep over the chunks forward and one backward, the last token's angles in VMEM.

With L the matrix of a chunk that has 1 where a token's sum has an earlier one, and u = dt rate for every head:

    angle = L u + the angles carried in, modulo a turn          du = L' dangle + the sum of later dangle
    ddt = sum over the angles of du rate                        drate = sum over the heads of du dt

The angles of all heads are side by side. dt and rate come to them, and their gradients from them, by products with matrices of
zeros and ones. Where a segment begins, nothing is carried on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic
from kernels_pallas.angle_sums.reference import angle_sums_xla
from kernels_pallas.arguments import differentiable
from kernels_pallas.chunks import chunk_segments
from kernels_pallas.mamba3.rotation import within_turn
from kernels_pallas.mosaic import LANES, Grid
from kernels_pallas.mosaic_chunk import NN, NT, TN, Contraction, dot_parts, iota
from kernels_pallas.operands import pad_axis, parts

MAX_LANES = 8192  # of the angles of all heads of a token


class _Chunk(NamedTuple):
    """Who adds up what in a chunk.

    Attributes:
      earlier: [C, C] bfloat16, 1 where the token of the row adds that of the column.
      enters: [C, 1], 1 for tokens whose sum has what is carried into the chunk.
      leaves: [C, 1], 1 for tokens that are in what is carried out of it.
      passes: [1, 1], 1 if what is carried in is carried out again.
    """

    earlier: jax.Array
    enters: jax.Array
    leaves: jax.Array
    passes: jax.Array


def _chunk(segments: jax.Ref) -> _Chunk:
    rows = segments[0, 0, 0]
    C = rows.shape[1]
    row, carried, column = rows[:1], rows[1:2, :1], rows.T[:, :1]
    last = row[:, C - 1 :]
    earlier = (iota((C, C), 0) >= iota((C, C), 1)) & (column == row)
    return _Chunk(_ones(earlier), *(x.astype(jnp.float32) for x in (column == carried, column == last, last == carried)))


def _places(begin: int, H: int, A: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns what has 1 where a lane from `begin` on is of a head, [H, 128], and where it has a rate, [A, 128]."""
    head = (begin + iota((H, LANES), 1)) // width == iota((H, LANES), 0)
    return _ones(head), _ones(iota((A, LANES), 1) % width == iota((A, LANES), 0))


def _ones(where: jax.Array) -> jax.Array:
    return where.astype(jnp.float32).astype(jnp.bfloat16)


def _picked(x: jax.Array, places: jax.Array, dims: Contraction = NN) -> jax.Array:
    """Returns the product of x, float32, with a matrix of zeros and ones, exact but for the sums."""
    return dot_parts(parts(x, jnp.bfloat16, 3), (places,), dims)


def _added(earlier: jax.Array, x: jax.Array, dims: Contraction = NN) -> jax.Array:
    """Returns the product of a matrix of zeros and ones with x, float32, likewise."""
    return dot_parts((earlier,), parts(x, jnp.bfloat16, 3), dims)


def _forward_kernel(rate, dt, initial, segments, angle, carry, *, width):
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = initial[0]

    chunk, rates, steps = _chunk(segments), rate[0], dt[0]
    for i in range(0, angle.shape[2], LANES):
        at = slice(i, i + LANES)
        of_head, of_rate = _places(i, steps.shape[1], rates.shape[1], width)
        turn = _picked(steps, of_head) * _picked(rates, of_rate)
        total = within_turn(_added(chunk.earlier, turn) + chunk.enters * carry[:1, at])
        angle[0, :, at] = total
        carry[:, at] = jnp.broadcast_to(total[-1:], (8, LANES))


def _backward_kernel(rate, dt, segments, dangle, drate, ddt, dinitial, carry, *, width):
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = jnp.zeros(carry.shape, jnp.float32)

    chunk, rates, steps = _chunk(segments), rate[0], dt[0]
    of_rates, of_steps = jnp.zeros_like(rates), jnp.zeros_like(steps)
    for i in range(0, dangle.shape[2], LANES):
        at = slice(i, i + LANES)
        of_head, of_rate = _places(i, steps.shape[1], rates.shape[1], width)
        d, later = dangle[0, :, at], carry[:1, at]
        dturn = _added(chunk.earlier, d, TN) + chunk.leaves * later
        of_steps += _picked(dturn * _picked(rates, of_rate), of_head, NT)
        of_rates += _picked(dturn * _picked(steps, of_head), of_rate, NT)
        out = jnp.sum(chunk.enters * d, axis=0, keepdims=True) + chunk.passes * later
        carry[:, at] = jnp.broadcast_to(out, (8, LANES))
    drate[0], ddt[0] = of_rates, of_steps

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dinitial[0] = carry[...]


def angle_sums_tpu(rate: jax.Array, dt: jax.Array, state: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The `pallas_tpu` implementation of `angle_sums`; see `kernels_pallas.contract`."""
    (B, T, A), H = rate.shape, dt.shape[2]
    width = 1 << max(A - 1, 0).bit_length()
    lanes = -(-H * width // LANES) * LANES
    if A == 0 or width > LANES or lanes > MAX_LANES:
        return angle_sums_xla(rate, dt, state, segments)
    chunks, carried = chunk_segments(jnp.zeros((B, T), jnp.int32) if segments is None else segments, LANES)
    rows = jnp.stack([chunks, jnp.broadcast_to(carried[..., None], chunks.shape)], axis=2).transpose(1, 0, 2, 3)
    rows = pad_axis(rows.astype(jnp.float32), 2, 8)[:, None]  # [B, 1, N, 8, C]
    initial = pad_axis(pad_axis(state, 2, width).reshape(B, 1, H * width), 2, LANES)
    angle = _sums(pad_axis(rate, 1, LANES), pad_axis(dt, 1, LANES), jnp.broadcast_to(initial, (B, 8, lanes)), rows, width)
    return angle[:, :T, : H * width].reshape(B, T, H, width)[..., :A]


def _grid(rate, dt, width, reverse=False) -> Grid:
    (B, T, _), H = rate.shape, dt.shape[2]
    return Grid(B, T, H, width, width, LANES, H, reverse)


def _tokens(grid: Grid, lanes: int) -> pl.BlockSpec:
    """Returns the blocks [1, C, lanes] of an array [B, T, lanes]."""
    return pl.BlockSpec((1, grid.C, lanes), lambda b, h, n: (b, grid.chunk(n), 0))


@differentiable(4)
def _sums(rate, dt, initial, segments, width) -> jax.Array:
    grid, lanes = _grid(rate, dt, width), initial.shape[2]
    of_state = pl.BlockSpec((1, 8, lanes), lambda b, h, n: (b, 0, 0))
    (angle,) = mosaic.run(
        lambda *refs: _forward_kernel(*refs, width=width),
        grid,
        "angle_sums_forward",
        [*((x, _tokens(grid, x.shape[2])) for x in (rate, dt)), (initial, of_state), (segments, grid.rows(8))],
        [(jax.ShapeDtypeStruct((grid.B, grid.T, lanes), jnp.float32), _tokens(grid, lanes))],
        [pltpu.VMEM((8, lanes), jnp.float32)],
    )
    return angle


def _vjp_forward(rate, dt, initial, segments, width):
    return _sums(rate, dt, initial, segments, width), (rate, dt, initial, segments)


def _vjp_backward(width, given, dangle):
    rate, dt, initial, segments = given
    grid, lanes = _grid(rate, dt, width, reverse=True), initial.shape[2]
    of_state = pl.BlockSpec((1, 8, lanes), lambda b, h, n: (b, 0, 0))
    drate, ddt, dinitial = mosaic.run(
        lambda *refs: _backward_kernel(*refs, width=width),
        grid,
        "angle_sums_backward",
        [*((x, _tokens(grid, x.shape[2])) for x in (rate, dt)), (segments, grid.rows(8)), (dangle, _tokens(grid, lanes))],
        [
            *((jax.ShapeDtypeStruct(x.shape, jnp.float32), _tokens(grid, x.shape[2])) for x in (rate, dt)),
            (jax.ShapeDtypeStruct(initial.shape, jnp.float32), of_state),
        ],
        [pltpu.VMEM((8, lanes), jnp.float32)],
    )
    return drate, ddt, dinitial.at[:, 1:].set(0), jnp.zeros_like(segments)


_sums.defvjp(_vjp_forward, _vjp_backward)
