"""What the TPU kernels share that norm rows: norms of the heads in a block, forward and backward, and the grid over rows.

With n = r x the normed head and dn its cotangent, dx = r (dn - k n (n . dn)), where

    L2                  r = 1 / sqrt(|x|^2 + eps)        k = 1
    L2, eps outside     r = 1 / (|x| + eps)              k = (|x| + eps) / |x|, and 0 for a zero vector
    RMS over D          r = 1 / sqrt(|x|^2 / D + eps)    k = 1 / D
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas.contract import HeadNorm
from kernels_pallas.mosaic import LANES, Grid, Input, Output
from kernels_pallas.mosaic_chunk import iota, row_sum
from kernels_pallas.operands import pad_axis

HEAD_DIMS = (64, 128, 256)  # that the kernels norm head by head
SUBLANES = 16  # of a bf16 register: blocks have a multiple of so many rows


def sigmoid_terms(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns SiLU(z) and its derivative."""
    s = jax.nn.sigmoid(z)
    return z * s, s * (1.0 + z * (1.0 - s))


def norm_heads(x: jax.Array, norm: HeadNorm) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Norms each head of a block x [C, L] float32, without a weight.

    Returns:
      n [C, L], and the function that maps its cotangent to that of x.
    """
    xs = _pieces(x, norm.dim)
    factors = [_factors(_totals(piece * piece, norm.dim), norm) for piece in xs]
    ns = [piece * r for piece, (r, _) in zip(xs, factors, strict=True)]

    def pull(dn: jax.Array) -> jax.Array:
        terms = zip(_pieces(dn, norm.dim), ns, factors, strict=True)
        return _joined([r * (d - n * (_totals(n * d, norm.dim) * k)) for d, n, (r, k) in terms])

    return _joined(ns), pull


def _pieces(x: jax.Array, dim: int) -> list[jax.Array]:
    """Returns the heads of x [C, L], each [C, dim]; two of 64 channels, which share registers, stay together."""
    width = max(dim, LANES)
    return [x[:, i : i + width] for i in range(0, x.shape[1], width)]


def _joined(pieces: list[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _totals(x: jax.Array, dim: int) -> jax.Array:
    """Returns the sums over each head of a piece: [C, 1], or [C, 128] where two heads share registers."""
    if dim >= LANES:
        return row_sum(x)
    first = iota(x.shape, 1) < dim
    return jnp.where(first, row_sum(jnp.where(first, x, 0.0)), row_sum(jnp.where(first, 0.0, x)))


def _factors(square: jax.Array, norm: HeadNorm) -> tuple[jax.Array, jax.Array | float]:
    """Returns r and k of the module's docstring, from the sum of the squares."""
    if norm.kind == "rms":
        return jax.lax.rsqrt(square * (1.0 / norm.dim) + norm.eps), 1.0 / norm.dim
    if not norm.eps_outside:
        return jax.lax.rsqrt(square + norm.eps), 1.0
    positive = square > 0
    inverse = jax.lax.rsqrt(jnp.where(positive, square, 1.0))
    return 1.0 / (square * inverse + norm.eps), jnp.where(positive, 1.0 + norm.eps * inverse, 0.0)


def rows_grid(rows: int, D: int, lanes: int, limit: int) -> Grid:
    """Returns the grid over an array [rows, D] in blocks of `lanes` channels and at most `limit` rows.

    The blocks are divided in two groups where they are even in number, so that a device with two cores uses both. The arrays of
    the grid are [groups, T, D] (`Grid.B` groups of `Grid.T` rows).
    """
    C = min(limit, -(-rows // SUBLANES) * SUBLANES)
    blocks = -(-rows // C)
    groups = 2 if blocks % 2 == 0 else 1
    return Grid(groups, blocks // groups * C, D // lanes, lanes, lanes, C, 1)


def rows_input(grid: Grid, x: jax.Array) -> Input:
    """Returns x [rows, D], with zeros at the end, as an input of `mosaic.run` over `rows_grid`."""
    return pad_axis(x, 0, grid.B * grid.T).reshape(grid.B, grid.T, -1), grid.tokens(grid.K)


def rows_output(grid: Grid, dtype: DTypeLike) -> Output:
    """Returns an array [rows, D] as an output of `mosaic.run` over `rows_grid`; `joined_rows` makes it one."""
    return grid.tokens_shape(grid.K, dtype), grid.tokens(grid.K)


def joined_rows(x: jax.Array, rows: int) -> jax.Array:
    """Returns an output [groups, T, D] as [rows, D]."""
    return x.reshape(-1, x.shape[2])[:rows]


def weight_input(grid: Grid, weight: jax.Array) -> Input:
    """Returns a weight [D] as an input of `mosaic.run` over `rows_grid`: eight equal rows."""
    return jnp.broadcast_to(weight, (8, weight.shape[0])), pl.BlockSpec((8, grid.K), lambda b, h, n: (0, h))


def weight_output(grid: Grid) -> Output:
    """Returns the gradient of a weight as an output of `mosaic.run` over `rows_grid`, [groups, 8, D]: `add_rows` adds to it."""
    shape = jax.ShapeDtypeStruct((grid.B, 8, grid.H * grid.K), jnp.float32)
    return shape, pl.BlockSpec((1, 8, grid.K), lambda b, h, n: (b, 0, h))


def add_rows(ref: jax.Ref, x: jax.Array) -> None:
    """Adds the rows of x [C, L] to a block [1, 8, L] that begins at 0 with each group: only registers are added here."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        ref[...] = jnp.zeros(ref.shape, ref.dtype)

    ref[0] += jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)
