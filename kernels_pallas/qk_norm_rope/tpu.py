"""Pallas kernels for TPU: heads normed, rotated and moved before the tokens, in one pass forward and one backward.

With n the normed head, h = n weight, h' its halves exchanged, c = (cos, cos), s = (-sin, sin) and m the scale:

    y = m (h c + h' s)      dh = m (dy c + (dy s)')      dx of dn = dh weight (see `mosaic_norms`)      dweight = sum of dh n
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import HeadNorm
from kernels_pallas.mosaic import Grid
from kernels_pallas.mosaic_norms import add_rows, norm_heads
from kernels_pallas.operands import pad_axis
from kernels_pallas.qk_norm_rope.reference import norm_rope_reference

CHUNK = 256  # tokens in a block, at most
LANES = 512  # channels in a block, at most
HEAD_DIMS = (128, 256)  # of complete registers


def _forward_kernel(x, weight, table, y, *, norm, normed):
    rows, D = x[0].astype(jnp.float32), norm.dim
    n = norm_heads(rows, norm)[0] if normed else rows
    c, s = table[0, :, :D], table[0, :, D:]
    for head in range(y.shape[1]):
        h = n[:, head * D : (head + 1) * D]
        h = h * weight[:1] if normed else h
        y[0, head] = (h * c + pltpu.roll(h, D // 2, 1) * s).astype(y.dtype)


def _backward_kernel(x, weight, table, dy, dx, dweight, *, norm, normed):
    D, heads = norm.dim, dy.shape[1]
    c, s = table[0, :, :D], table[0, :, D:]
    ds = [dy[0, head].astype(jnp.float32) for head in range(heads)]
    dhs = [d * c + pltpu.roll(d * s, D // 2, 1) for d in ds]
    if not normed:
        dx[0] = jnp.concatenate(dhs, axis=1).astype(dx.dtype)
        add_rows(dweight, jnp.zeros_like(c))
        return
    n, pull = norm_heads(x[0].astype(jnp.float32), norm)
    terms = [dh * n[:, head * D : (head + 1) * D] for head, dh in enumerate(dhs)]
    add_rows(dweight, functools.reduce(jnp.add, terms))
    dx[0] = pull(jnp.concatenate([dh * weight[:1] for dh in dhs], axis=1)).astype(dx.dtype)


def norm_rope_tpu(x: jax.Array, weight: jax.Array | None, cos: jax.Array, sin: jax.Array, eps: float, scale: float) -> jax.Array:
    """The `pallas_tpu` implementation of `qk_norm_rope`; see `kernels_pallas.contract`."""
    B, T, H, D = x.shape
    if D not in HEAD_DIMS or 2 * cos.shape[-1] != D:
        return norm_rope_reference(x, weight, cos, sin, eps, scale)
    C = CHUNK if T > CHUNK // 2 else CHUNK // 2
    cos, sin = (scale * table.astype(jnp.float32) for table in (cos, sin))
    table = pad_axis(jnp.concatenate([cos, cos, -sin, sin], axis=-1), 1, C)
    given = jnp.ones(D, jnp.float32) if weight is None else weight.astype(jnp.float32)
    padded = pad_axis(x.reshape(B, T, H * D), 1, C)
    return _norm_rope(padded, given, table, HeadNorm("rms", D, eps), weight is not None)[:, :, :T]


def _grid(x: jax.Array, norm: HeadNorm) -> Grid:
    B, T, D = x.shape
    lanes = mosaic.lanes_per_step(D, LANES, norm.dim)
    return Grid(B, T, D // lanes, lanes, lanes, min(CHUNK, T), 1)


def _inputs(grid: Grid, x, weight, table, norm) -> list[mosaic.Input]:
    rows = jnp.broadcast_to(weight, (8, norm.dim)), pl.BlockSpec((8, norm.dim), lambda b, h, n: (0, 0))
    return [(x, grid.tokens(grid.K)), rows, (table, pl.BlockSpec((1, grid.C, 2 * norm.dim), lambda b, h, n: (b, n, 0)))]


def _heads_first(grid: Grid, norm: HeadNorm) -> pl.BlockSpec:
    return pl.BlockSpec((1, grid.K // norm.dim, grid.C, norm.dim), lambda b, h, n: (b, h, n, 0))


@differentiable(3, 4)
def _norm_rope(x, weight, table, norm, normed) -> jax.Array:
    grid = _grid(x, norm)
    shape = jax.ShapeDtypeStruct((grid.B, x.shape[2] // norm.dim, grid.T, norm.dim), x.dtype)
    (y,) = mosaic.run(
        functools.partial(_forward_kernel, norm=norm, normed=normed),
        grid,
        "qk_norm_rope_forward",
        _inputs(grid, x, weight, table, norm),
        [(shape, _heads_first(grid, norm))],
        [],
    )
    return y


def _vjp_forward(x, weight, table, norm, normed):
    return _norm_rope(x, weight, table, norm, normed), (x, weight, table)


def _vjp_backward(norm, normed, residuals, dy):
    x, weight, table = residuals
    grid, D = _grid(x, norm), norm.dim
    sums = jax.ShapeDtypeStruct((grid.B, 8, grid.H * D), jnp.float32), pl.BlockSpec((1, 8, D), lambda b, h, n: (b, 0, h))
    dx, dweight = mosaic.run(
        functools.partial(_backward_kernel, norm=norm, normed=normed),
        grid,
        "qk_norm_rope_backward",
        [*_inputs(grid, x, weight, table, norm), (dy, _heads_first(grid, norm))],
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), grid.tokens(grid.K)), sums],
        [],
    )
    return dx, dweight.reshape(-1, grid.H, D).sum((0, 1)), jnp.zeros_like(table)


_norm_rope.defvjp(_vjp_forward, _vjp_backward)
