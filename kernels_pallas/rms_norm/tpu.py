"""Pallas kernels for TPU: blocks of complete rows, read once forward and once backward.

Backward, with n the normed rows, dn = dy weight, and ds the cotangent of the sum (see `mosaic_norms`):

    dx = dresidual = r (dn - n mean(n dn)) + ds      dweight = sum over the rows of dy n
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import HeadNorm
from kernels_pallas.mosaic import Grid
from kernels_pallas.mosaic_norms import (
    SUBLANES,
    add_rows,
    joined_rows,
    norm_heads,
    rows_grid,
    rows_input,
    rows_output,
    weight_input,
    weight_output,
)
from kernels_pallas.rms_norm.reference import rms_norm_reference

ROWS = 256  # in a block, at most
BLOCK = 1 << 19  # numbers in a block, at most


def _forward_kernel(*refs, eps, added):
    if added:
        x, residual, weight, y, total = refs
        total[0] = (x[0].astype(jnp.float32) + residual[0].astype(jnp.float32)).astype(total.dtype)
        rows = total[0].astype(jnp.float32)
    else:
        x, weight, y = refs
        rows = x[0].astype(jnp.float32)
    n, _ = norm_heads(rows, HeadNorm("rms", rows.shape[1], eps))
    y[0] = (n * weight[:1]).astype(y.dtype)


def _backward_kernel(total, weight, dy, *refs, eps):
    *dtotal, dx, dweight = refs
    rows, d = total[0].astype(jnp.float32), dy[0].astype(jnp.float32)
    n, pull = norm_heads(rows, HeadNorm("rms", rows.shape[1], eps))
    add_rows(dweight, d * n)
    drows = pull(d * weight[:1])
    dx[0] = (drows + dtotal[0][0].astype(jnp.float32) if dtotal else drows).astype(dx.dtype)


def rms_norm_tpu(x: jax.Array, weight: jax.Array | None, residual: jax.Array | None, eps: float) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `rms_norm`; see `kernels_pallas.contract`."""
    D = x.shape[-1]
    if D % mosaic.LANES or BLOCK // D < SUBLANES:
        return rms_norm_reference(x, weight, residual, eps)
    given = jnp.ones(D, jnp.float32) if weight is None else weight.astype(jnp.float32)
    y, *total = _norm(x.reshape(-1, D), given, None if residual is None else residual.reshape(-1, D), eps)
    return y.reshape(x.shape), total[0].reshape(x.shape) if total else x


def _grid(x: jax.Array) -> Grid:
    rows, D = x.shape
    return rows_grid(rows, D, D, min(ROWS, 1 << (BLOCK // D).bit_length() - 1))


@differentiable(3)
def _norm(x, weight, residual, eps) -> tuple[jax.Array, ...]:
    grid, added = _grid(x), residual is not None
    outputs = mosaic.run(
        functools.partial(_forward_kernel, eps=eps, added=added),
        grid,
        "rms_norm_forward",
        [rows_input(grid, x), *([rows_input(grid, residual)] if added else []), weight_input(grid, weight)],
        [rows_output(grid, x.dtype)] * (1 + added),
        [],
    )
    return tuple(joined_rows(y, x.shape[0]) for y in outputs)


def _vjp_forward(x, weight, residual, eps):
    outputs = _norm(x, weight, residual, eps)
    return outputs, (x if residual is None else outputs[1], weight)


def _vjp_backward(eps, residuals, cotangents):
    total, weight = residuals
    grid = _grid(total)
    dx, dweight = mosaic.run(
        functools.partial(_backward_kernel, eps=eps),
        grid,
        "rms_norm_backward",
        [rows_input(grid, total), weight_input(grid, weight), *(rows_input(grid, d) for d in cotangents)],
        [rows_output(grid, total.dtype), weight_output(grid)],
        [],
    )
    dx = joined_rows(dx, total.shape[0])
    return dx, dweight.sum((0, 1)), dx if len(cotangents) == 2 else None


_norm.defvjp(_vjp_forward, _vjp_backward)
