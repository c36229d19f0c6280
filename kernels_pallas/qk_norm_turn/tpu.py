"""Pallas kernels for TPU: heads of queries and keys normed, biased and rotated in one pass forward and one backward.

With n the normed head, h = n weight + bias, h' its pairs exchanged, and c, s every channel's cosine and signed sine (1 and 0 for
channels that are not rotated):

    y = h c + h' s      dh = dy c - dy' s      dx of dn = dh weight (see `mosaic_norms`)
    dweight = sum of dh n      dbias = sum of dh over the tokens      dangle = sum over a pair of sign dh h', of q and of k

A register has the angles of several heads. Their cosines and sines become those of channels by a product with a matrix of zeros
and ones, and the gradients of channels become those of angles by its transpose. Pairs are exchanged by such a product too, on the
matrix units, which are idle otherwise: it is exact, but bfloat16 operands round h.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import HeadNorm
from kernels_pallas.heads import repeat_heads
from kernels_pallas.mamba3.rotation import HIGH, LOW, TURN
from kernels_pallas.mosaic import LANES, Grid
from kernels_pallas.mosaic_chunk import NT, dot, dot_parts, iota
from kernels_pallas.mosaic_norms import SUBLANES, add_rows, norm_heads
from kernels_pallas.operands import operand_dtype, pad_axis, parts
from kernels_pallas.qk_norm_turn.reference import norm_turn_reference

CHUNK = 256  # tokens in a block, at most
HEADS = 8  # in a block, at most
HEAD_DIMS = (128, 256)  # of complete registers


class _Form(NamedTuple):
    """What the kernels are built for.

    Attributes:
      norm: of each head, K channels.
      heads: in a block.
      width: how many lanes the angles of a head have, a divisor of 128.
      angles: how many of them there are.
      halves: of `qk_norm_turn`.
    """

    norm: HeadNorm
    heads: int
    width: int
    angles: int
    halves: bool


def _exchange(form: _Form, low: DTypeLike) -> jax.Array:
    """Returns the matrix [K, K] that exchanges the channels of each pair."""
    shape = (form.norm.dim, form.norm.dim)
    other = iota(shape, 1) ^ (form.norm.dim // 2 if form.halves else 1)
    return (iota(shape, 0) == other).astype(jnp.float32).astype(low)


def cos_sin(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cosine and the sine of float32 angles in radians, to 3e-7 for up to a few hundred turns.

    A turn is taken off until the half of the angle is within a quarter of a turn of 0; there the Taylor series are short.
    """
    turns = jnp.floor(x * (1 / TURN) + 0.5)
    half = 0.5 * ((x - turns * HIGH) - turns * LOW)
    square = half * half

    def series(first: int, terms: int) -> jax.Array:
        factors = [(-1) ** n / math.factorial(first + 2 * n) for n in range(terms)]
        return functools.reduce(lambda total, factor: total * square + factor, reversed(factors[:-1]), factors[-1])

    sine, cosine = half * series(1, 6), series(0, 7)
    return (cosine - sine) * (cosine + sine), 2 * sine * cosine


def _spread(form: _Form) -> np.ndarray:
    """Returns [128, n K] for the n heads of a register: a rotated channel's column has -1 or 1 in the row of its angle."""
    K, A = form.norm.dim, form.angles
    channel = np.arange(K)
    pair, second = (channel % (K // 2), channel >= K // 2) if form.halves else (channel // 2, channel % 2 == 1)
    rows = np.arange(LANES)[:, None, None] == np.arange(0, LANES, form.width)[:, None] + pair
    return (rows * (pair < A) * np.where(second, 1, -1)).reshape(LANES, -1).astype(np.float32)


def _channels(angle: jax.Ref, spread: jax.Ref, form: _Form) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns every head's c and s, [C, K]."""
    K, low = form.norm.dim, spread.dtype
    signed = spread[...]
    plain = jnp.abs(signed)
    stays = 1.0 - jnp.sum(plain[:, :K].astype(jnp.float32), axis=0, keepdims=True)
    cosines, sines = [], []
    for i in range(0, angle.shape[2], LANES):
        x = angle[0, :, i : i + LANES]
        c, s = cos_sin(x)
        c, s = dot(c.astype(low), plain), dot(s.astype(low), signed)
        cosines += [c[:, j : j + K] + stays for j in range(0, c.shape[1], K)]
        sines += [s[:, j : j + K] for j in range(0, s.shape[1], K)]
    return cosines, sines


def _of_head(x: jax.Array, head: int, K: int) -> jax.Array:
    return x[:, head * K : (head + 1) * K]


def _forward_kernel(q, k, q_weight, k_weight, q_bias, k_bias, angle, spread, yq, yk, *, form):
    K, low, (cosines, sines) = form.norm.dim, spread.dtype, _channels(angle, spread, form)
    exchange = _exchange(form, low)
    for x, weight, bias, y in ((q, q_weight, q_bias, yq), (k, k_weight, k_bias, yk)):
        n, _ = norm_heads(x[0].astype(jnp.float32), form.norm)
        group = y.shape[2] // x.shape[2]
        for head, (c, s) in enumerate(zip(cosines, sines, strict=True)):
            h = _of_head(n, head // group, K) * weight[:1] + _of_head(bias, head, K)[:1]
            y[0, :, head * K : (head + 1) * K] = (h * c + dot(h.astype(low), exchange) * s).astype(y.dtype)


def _backward_kernel(
    q, k, q_weight, k_weight, q_bias, k_bias, angle, spread, dyq, dyk, dq, dk, dwq, dwk, dbq, dbk, dangle, *, form
):
    K, heads, low = form.norm.dim, form.heads, spread.dtype
    exchange, (cosines, sines) = _exchange(form, low), _channels(angle, spread, form)
    turned = [jnp.zeros_like(c) for c in cosines]
    for x, weight, bias, dy, dx, dw, db in (
        (q, q_weight, q_bias, dyq, dq, dwq, dbq), (k, k_weight, k_bias, dyk, dk, dwk, dbk),
    ):  # fmt: skip
        n, pull = norm_heads(x[0].astype(jnp.float32), form.norm)
        group, sums = heads * K // x.shape[2], []
        for head, (c, s) in enumerate(zip(cosines, sines, strict=True)):
            d = _of_head(dy[0], head, K)
            dh = d.astype(jnp.float32) * c - dot(d.astype(low), exchange) * s
            h = _of_head(n, head // group, K) * weight[:1] + _of_head(bias, head, K)[:1]
            turned[head] += dh * dot(h.astype(low), exchange)
            sums.append(dh)
        add_rows(db, jnp.concatenate(sums, axis=1))
        sums = [functools.reduce(jnp.add, sums[i : i + group]) for i in range(0, heads, group)]
        add_rows(dw, functools.reduce(jnp.add, [d * _of_head(n, i, K) for i, d in enumerate(sums)]))
        dx[0] = pull(jnp.concatenate([d * weight[:1] for d in sums], axis=1)).astype(dx.dtype)
    each = LANES // form.width
    for i in range(0, heads, each):
        z = parts(jnp.concatenate(turned[i : i + each], axis=1), low)
        dangle[0, :, i * form.width : (i + each) * form.width] = dot_parts(z, (spread[...],), NT)


def norm_turn_tpu(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    q_bias: jax.Array,
    k_bias: jax.Array,
    angle: jax.Array,
    eps: float,
    halves: bool,
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `qk_norm_turn`; see `kernels_pallas.contract`."""
    (B, T, R, _, K), (H, A) = q.shape, angle.shape[2:]
    if K not in HEAD_DIMS or A == 0:
        return norm_turn_reference(q, k, q_weight, k_weight, q_bias, k_bias, angle, eps, halves)
    low = operand_dtype(q, k)
    groups = H // q.shape[3], H // k.shape[3]
    heads = mosaic.heads_per_step(H, HEADS, K, K, low, groups)
    if 2 * heads <= mosaic.heads_per_step(H, HEADS, K, K, low):  # a group is larger than a block
        q, k, heads = repeat_heads(q, H), repeat_heads(k, H), mosaic.heads_per_step(H, HEADS, K, K, low)
    width = max(LANES // int(np.gcd(heads, LANES)), 1 << (A - 1).bit_length())
    form = _Form(HeadNorm("rms", K, eps), heads, width, A, halves)
    C = min(CHUNK, -(-T // SUBLANES) * SUBLANES)
    rows = [pad_axis(x.reshape(B, T, -1), 1, C) for x in (q, k)]
    angles = pad_axis(pad_axis(angle.astype(jnp.float32), 3, width), 1, C).reshape(B, -1, H * width)
    biases = (bias.astype(jnp.float32).swapaxes(0, 1).reshape(-1) for bias in (q_bias, k_bias))
    weights = (weight.astype(jnp.float32) for weight in (q_weight, k_weight))
    yq, yk = _turn(*rows, *weights, *biases, angles, jnp.asarray(_spread(form), low), form)
    return yq[:, :T].reshape(B, T, R, H, K), yk[:, :T].reshape(B, T, R, H, K)


def _grid(q, q_bias, form: _Form) -> Grid:
    B, T, _ = q.shape
    K = form.norm.dim
    return Grid(B, T, q_bias.shape[0] // K, K, K, min(CHUNK, T), form.heads)


def _inputs(grid: Grid, given: Sequence[jax.Array], form: _Form) -> list[mosaic.Input]:
    """Returns the arguments of `_turn` as inputs of `mosaic.run`."""
    q, k, q_weight, k_weight, q_bias, k_bias, angle, spread = given
    K, steps = grid.K, angle.shape[2] // (form.heads * form.width)
    of_weight = pl.BlockSpec((8, K), lambda b, h, n: (0, 0))
    of_bias = pl.BlockSpec((8, form.heads * K), lambda b, h, n: (0, h))
    inputs = [(x, grid.tokens(K, grid.H * K // x.shape[2])) for x in (q, k)]
    inputs += [(jnp.broadcast_to(x, (8, K)), of_weight) for x in (q_weight, k_weight)]
    inputs += [(jnp.broadcast_to(x, (8, x.shape[0])), of_bias) for x in (q_bias, k_bias)]
    inputs.append((angle, pl.BlockSpec((1, grid.C, form.heads * form.width), lambda b, h, n: (b, n, h % steps))))
    return [*inputs, (spread, pl.BlockSpec(spread.shape, lambda b, h, n: (0, 0)))]


@differentiable(8)
def _turn(q, k, q_weight, k_weight, q_bias, k_bias, angle, spread, form) -> tuple[jax.Array, jax.Array]:
    grid = _grid(q, q_bias, form)
    yq, yk = mosaic.run(
        functools.partial(_forward_kernel, form=form),
        grid,
        "qk_norm_turn_forward",
        _inputs(grid, (q, k, q_weight, k_weight, q_bias, k_bias, angle, spread), form),
        [(grid.tokens_shape(grid.K, x.dtype), grid.tokens(grid.K)) for x in (q, k)],
        [],
    )
    return yq, yk


def _vjp_forward(q, k, q_weight, k_weight, q_bias, k_bias, angle, spread, form):
    y = _turn(q, k, q_weight, k_weight, q_bias, k_bias, angle, spread, form)
    return y, (q, k, q_weight, k_weight, q_bias, k_bias, angle, spread)


def _vjp_backward(form, given, cotangents):
    q, k, *_, q_bias, _, angle, spread = given
    grid, K = _grid(q, q_bias, form), form.norm.dim
    steps = grid.H // form.heads

    def sums(lanes: int) -> mosaic.Output:
        shape = jax.ShapeDtypeStruct((grid.B, 8, steps * lanes), jnp.float32)
        return shape, pl.BlockSpec((1, 8, lanes), lambda b, h, n: (b, 0, h))

    dq, dk, *dweights, dbq, dbk, dangle = mosaic.run(
        functools.partial(_backward_kernel, form=form),
        grid,
        "qk_norm_turn_backward",
        [*_inputs(grid, given, form), *((d, grid.tokens(K)) for d in cotangents)],
        [
            *((jax.ShapeDtypeStruct(x.shape, x.dtype), grid.tokens(K, grid.H * K // x.shape[2])) for x in (q, k)),
            sums(K),
            sums(K),
            sums(form.heads * K),
            sums(form.heads * K),
            (grid.tokens_shape(form.width, jnp.float32), grid.tokens(form.width)),
        ],
        [],
    )
    dweights = [d.reshape(-1, steps, K).sum((0, 1)) for d in dweights]
    dangle = dangle.reshape(*dangle.shape[:2], -1, angle.shape[2]).sum(2)
    return dq, dk, *dweights, dbq.sum((0, 1)), dbk.sum((0, 1)), dangle, jnp.zeros_like(spread)


_turn.defvjp(_vjp_forward, _vjp_backward)
