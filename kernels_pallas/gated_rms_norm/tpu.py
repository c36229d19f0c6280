"""Pallas kernels for TPU: blocks of rows and heads, read once forward and once backward.

Backward, with n the normed head and g = SiLU(gate):

    dn = dy g weight      do = dn of the norm's input (see `mosaic_norms`)      dgate = dy n weight SiLU'(gate)
    dweight = sum over the rows of dy n g

and where the gate is first, with n the norm of o g and dx the cotangent of o g:

    dn = dy weight        do = dx g      dgate = dx o SiLU'(gate)      dweight = sum over the rows of dy n
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import HeadNorm
from kernels_pallas.gated_rms_norm.reference import gated_rms_norm_reference
from kernels_pallas.mosaic import Grid
from kernels_pallas.mosaic_norms import (
    HEAD_DIMS,
    add_rows,
    joined_rows,
    norm_heads,
    rows_grid,
    rows_input,
    rows_output,
    sigmoid_terms,
    weight_input,
    weight_output,
)
from kernels_pallas.operands import pad_axis

ROWS = 256  # in a block, at most
LANES = 512  # channels in a block, at most


def _forward_kernel(o, gate, weight, y, *, norm, gate_first):
    x, z = o[0].astype(jnp.float32), gate[0].astype(jnp.float32)
    g = z * jax.nn.sigmoid(z)
    n, _ = norm_heads(x * g if gate_first else x, norm)
    y[0] = (n * weight[:1] if gate_first else n * weight[:1] * g).astype(y.dtype)


def _backward_kernel(o, gate, weight, dy, do, dgate, dweight, *, norm, gate_first):
    x, z, d = (ref[0].astype(jnp.float32) for ref in (o, gate, dy))
    g, slope = sigmoid_terms(z)
    if gate_first:
        n, pull = norm_heads(x * g, norm)
        add_rows(dweight, d * n)
        dx = pull(d * weight[:1])
        do[0], dgate[0] = (dx * g).astype(do.dtype), (dx * x * slope).astype(dgate.dtype)
        return
    n, pull = norm_heads(x, norm)
    t = d * n
    add_rows(dweight, t * g)
    dgate[0] = (t * weight[:1] * slope).astype(dgate.dtype)
    do[0] = pull(d * g * weight[:1]).astype(do.dtype)


def gated_rms_norm_tpu(o: jax.Array, gate: jax.Array, weight: jax.Array, eps: float, gate_first: bool) -> jax.Array:
    """The `pallas_tpu` implementation of `gated_rms_norm`; see `kernels_pallas.contract`."""
    B, T, H, D = o.shape
    if D not in HEAD_DIMS:
        return gated_rms_norm_reference(o, gate, weight, eps, gate_first)
    rows = [pad_axis(x.reshape(B * T, H * D), 1, mosaic.LANES) for x in (o, gate)]
    weight = pad_axis(jnp.broadcast_to(weight.astype(jnp.float32), (H, D)).reshape(-1), 0, mosaic.LANES)
    y = _norm(*rows, weight, HeadNorm("rms", D, eps), gate_first)
    return y[:, : H * D].reshape(o.shape)


def _grid(o: jax.Array, norm: HeadNorm) -> Grid:
    rows, D = o.shape
    return rows_grid(rows, D, mosaic.lanes_per_step(D, LANES, max(norm.dim, mosaic.LANES)), ROWS)


@differentiable(3, 4)
def _norm(o, gate, weight, norm, gate_first) -> jax.Array:
    grid = _grid(o, norm)
    (y,) = mosaic.run(
        functools.partial(_forward_kernel, norm=norm, gate_first=gate_first),
        grid,
        "gated_rms_norm_forward",
        [rows_input(grid, o), rows_input(grid, gate), weight_input(grid, weight)],
        [rows_output(grid, o.dtype)],
        [],
    )
    return joined_rows(y, o.shape[0])


def _vjp_forward(o, gate, weight, norm, gate_first):
    return _norm(o, gate, weight, norm, gate_first), (o, gate, weight)


def _vjp_backward(norm, gate_first, residuals, dy):
    o, gate, weight = residuals
    grid = _grid(o, norm)
    do, dgate, dweight = mosaic.run(
        functools.partial(_backward_kernel, norm=norm, gate_first=gate_first),
        grid,
        "gated_rms_norm_backward",
        [rows_input(grid, o), rows_input(grid, gate), weight_input(grid, weight), rows_input(grid, dy)],
        [rows_output(grid, o.dtype), rows_output(grid, gate.dtype), weight_output(grid)],
        [],
    )
    return joined_rows(do, o.shape[0]), joined_rows(dgate, o.shape[0]), dweight.sum((0, 1))


_norm.defvjp(_vjp_forward, _vjp_backward)
