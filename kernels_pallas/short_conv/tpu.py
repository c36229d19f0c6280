"""Pallas kernels for TPU: the shifted products, the activation and the heads' norm in one pass over x, forward and backward.

Forward, blocks of C tokens in order; the last 8 tokens of a block stay in VMEM for the next one. Backward, from
the last block to the first, with p the sum before the activation, recomputed:

    dp = dy act'(p)      dx_i = sum_j w_j dp_{i + W - 1 - j}      dw_j = sum_t dp_t x_{t - W + 1 + j}

where the dp of the 8 tokens after a block stay in VMEM. In a packed row, `seen` is the number of earlier tokens that a
token depends on. An L2 norm turns dy first, an RMS norm dx last (`mosaic_norms`); both are recomputed. Before an RMS norm's
convolution the x above, and the 8 tokens kept, are the normed ones.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.contract import HeadNorm
from kernels_pallas.mosaic import Grid
from kernels_pallas.mosaic_norms import HEAD_DIMS, norm_heads, sigmoid_terms
from kernels_pallas.operands import pad_axis
from kernels_pallas.short_conv.chunked import last_inputs
from kernels_pallas.short_conv.heads import norm_inputs, norm_outputs

CHUNK = 256  # tokens per grid step
LANES = 512  # at most this many channels per grid step
HALO = 8  # tokens kept from a neighbour: the sublanes of a register


def _taps(x, before, seen, W):
    """Returns x_{t - W + 1 + j} for every j, [C,D] as x, zeros where it is not `seen`; before: the 8 tokens before."""
    C = x.shape[0]
    together = jnp.concatenate([before, x], axis=0)
    taps = [together[HALO - (W - 1 - j) : HALO - (W - 1 - j) + C] for j in range(W)]
    return [t if seen is None or j == W - 1 else jnp.where(seen >= W - 1 - j, t, 0.0) for j, t in enumerate(taps)]


def _preactivation(taps, weight, bias):
    total = bias
    for j, tap in enumerate(taps):
        total = total + tap * weight[j : j + 1]
    return total


def _column(ref):
    """Returns row 0 of a block [1,1,1,8,C] as a column [C,1], or None."""
    return None if ref is None else ref[0, 0, 0].T[:, :1]


def _forward_kernel(*refs, W, silu, packed, norm):
    x, weight, added, initial, *seen, y, tail = refs
    seen = _column(seen[0] if packed else None)

    @pl.when(pl.program_id(2) == 0)
    def _():
        tail[...] = initial[0]

    inputs = _inputs(x[0], added, norm)[0]
    p = _preactivation(_taps(inputs, tail[...], seen, W), weight[...], added[:1])
    a = p * jax.nn.sigmoid(p) if silu else p
    y[0] = (norm_heads(a, norm)[0] if _kind(norm) == "l2" else a).astype(y.dtype)
    tail[...] = inputs[-HALO:]


def _kind(norm):
    return None if norm is None else norm.kind


def _inputs(x, added, norm):
    """Returns the convolution's inputs in float32: x, or n * weight of an RMS norm; and, of the latter, n and its pull-back."""
    x = x.astype(jnp.float32)
    if _kind(norm) != "rms":
        return x, None
    n, pull = norm_heads(x, norm)
    return n * added[1:2], (n, pull)


def _backward_kernel(*refs, W, silu, packed, norm):
    x, before, weight, added, initial, dy, *seen, dx, sums, dinitial, head, total, mask = refs
    seen = _column(seen[0] if packed else None)
    n = pl.program_id(2)  # 0: the last block
    first_block = n == pl.num_programs(2) - 1

    @pl.when(n == 0)
    def _():
        head[...] = jnp.zeros_like(head)
        total[...] = jnp.zeros_like(total)
        mask[...] = jnp.zeros_like(mask)

    C = x.shape[1]
    w = weight[...]
    start = jnp.where(first_block, initial[0], _inputs(before[0], added, norm)[0])
    inputs, normed = _inputs(x[0], added, norm)
    taps = _taps(inputs, start, seen, W)
    dp = dy[0].astype(jnp.float32)
    if silu or _kind(norm) == "l2":
        p = _preactivation(taps, w, added[:1])
        a, slope = sigmoid_terms(p) if silu else (p, 1.0)
        dp = (norm_heads(a, norm)[1](dp) if _kind(norm) == "l2" else dp) * slope
    rows = [jnp.sum(dp * tap, axis=0, keepdims=True) for tap in taps] + [jnp.sum(dp, axis=0, keepdims=True)]
    total[...] += jnp.concatenate([*rows, jnp.zeros((HALO * 2 - len(rows), dp.shape[1]), jnp.float32)], axis=0)

    outer = jnp.concatenate([jnp.zeros((HALO, dp.shape[1]), jnp.float32), dp, head[...]], axis=0)
    reached = None
    if seen is not None:  # `seen` of the token at each row of `outer`
        spread = jnp.broadcast_to(seen, (C, dp.shape[1]))
        reached = jnp.concatenate([jnp.zeros((HALO, dp.shape[1]), jnp.float32), spread, mask[...]], axis=0)
        mask[...] = spread[:HALO]
    gradient: Any = 0.0
    for j in range(W):
        delta = W - 1 - j
        shifted = outer[delta : delta + HALO + C]
        if reached is not None and delta:
            shifted = jnp.where(reached[delta : delta + HALO + C] >= delta, shifted, 0.0)
        gradient = gradient + shifted * w[j : j + 1]
    dinputs = gradient[HALO:]
    if normed is not None:
        n, pull = normed
        total[W + 1 : W + 2] += jnp.sum(dinputs * n, axis=0, keepdims=True)
        dinputs = pull(dinputs * added[1:2])
    dx[0] = dinputs.astype(dx.dtype)
    head[...] = dp[:HALO]

    @pl.when(first_block)
    def _():
        dinitial[0] = gradient[:HALO]
        sums[0] = total[...]


def _grid(x, norm, reverse=False) -> tuple[Grid, int]:
    """Returns the grid and its `lanes`: a block of that many channels is handled as a head is."""
    B, T, D = x.shape
    lanes = mosaic.lanes_per_step(D, LANES, mosaic.LANES if norm is None else max(norm.dim, mosaic.LANES))
    return Grid(B, T, D // lanes, lanes, lanes, min(CHUNK, T), 1, reverse), lanes


def _seen_rows(segments, W, T, C):
    """Returns `seen` as [B, 1, T'/C, 8, C]: how many tokens before each one it depends on, W - 1 or, in a later segment, fewer."""
    B = segments.shape[0]
    index = jnp.arange(segments.shape[1])
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    seen = jnp.minimum(jnp.where(segments == 0, W - 1, index - start), W - 1).astype(jnp.float32)
    seen = jnp.pad(seen, ((0, 0), (0, T - seen.shape[1]))).reshape(B, 1, T // C, 1, C)
    return jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, 7), (0, 0)))


def short_conv_tpu(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    activation: str | None,
    norm: HeadNorm | None,
    norm_weight: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `short_conv`; see `kernels_pallas.contract`."""
    T, D, W = x.shape[1], x.shape[2], weight.shape[1]
    if W > HALO:
        raise ValueError(f"short_conv: the TPU kernel takes at most {HALO} taps, got {W}; use implementation='xla'")
    if norm is not None and norm.dim not in HEAD_DIMS:
        y, state = short_conv_tpu(norm_inputs(x, norm, norm_weight), weight, bias, state, segments, activation, None, None)
        return norm_outputs(y, norm), state
    C = CHUNK if T > CHUNK // 2 else CHUNK // 2
    padded = pad_axis(pad_axis(x, 2, mosaic.LANES), 1, C)
    initial = jnp.pad(state.astype(jnp.float32), ((0, 0), (HALO - (W - 1), 0), (0, padded.shape[2] - D)))
    taps = pad_axis(pad_axis(weight.T.astype(jnp.float32), 1, mosaic.LANES), 0, HALO)
    rows = [bias] if norm_weight is None else [bias, jnp.tile(norm_weight, D // norm_weight.shape[0])]
    added = pad_axis(pad_axis(jnp.stack([row.astype(jnp.float32) for row in rows]), 1, mosaic.LANES), 0, HALO)
    seen = None if segments is None else _seen_rows(segments, W, padded.shape[1], C)
    y = _conv(padded, taps, added, initial, seen, W, activation == "silu", norm)
    return y[:, :T, :D], last_inputs(norm_inputs(x[:, max(T - (W - 1), 0) :], norm, norm_weight), state, segments)


@differentiable(5, 6, 7)
def _conv(x, weight, added, initial, seen, W, silu, norm) -> jax.Array:
    grid, lanes = _grid(x, norm)
    taps = pl.BlockSpec((HALO, lanes), lambda b, h, n: (0, h))
    inputs = [
        (x, grid.tokens(lanes)),
        (weight, taps),
        (added, taps),
        (initial, pl.BlockSpec((1, HALO, lanes), lambda b, h, n: (b, 0, h))),
    ]
    if seen is not None:
        inputs.append((seen, pl.BlockSpec((1, 1, 1, 8, grid.C), lambda b, h, n: (b, 0, n, 0, 0))))
    return mosaic.run(
        functools.partial(_forward_kernel, W=W, silu=silu, packed=seen is not None, norm=norm),
        grid,
        "short_conv_forward",
        inputs,
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), grid.tokens(lanes))],
        [pltpu.VMEM((HALO, lanes), jnp.float32)],
    )[0]


def _vjp_forward(x, weight, added, initial, seen, W, silu, norm):
    return _conv(x, weight, added, initial, seen, W, silu, norm), (x, weight, added, initial, seen)


def _vjp_backward(W, silu, norm, residuals, dy):
    x, weight, added, initial, seen = residuals
    grid, lanes = _grid(x, norm, reverse=True)
    N, C = grid.N, grid.C
    taps = pl.BlockSpec((HALO, lanes), lambda b, h, n: (0, h))
    edge = pl.BlockSpec((1, HALO, lanes), lambda b, h, n: (b, 0, h))
    both = pl.BlockSpec((1, 2 * HALO, lanes), lambda b, h, n: (b, 0, h))
    before = pl.BlockSpec((1, HALO, lanes), lambda b, h, n: (b, jnp.maximum((N - 1 - n) * (C // HALO) - 1, 0), h))
    inputs = [
        (x, grid.tokens(lanes)),
        (x, before),
        (weight, taps),
        (added, taps),
        (initial, edge),
        (dy, grid.tokens(lanes)),
    ]
    if seen is not None:
        inputs.append((seen, pl.BlockSpec((1, 1, 1, 8, C), lambda b, h, n: (b, 0, N - 1 - n, 0, 0))))
    B, _, D = x.shape
    dx, sums, dinitial = mosaic.run(
        functools.partial(_backward_kernel, W=W, silu=silu, packed=seen is not None, norm=norm),
        grid,
        "short_conv_backward",
        inputs,
        [
            (jax.ShapeDtypeStruct(x.shape, x.dtype), grid.tokens(lanes)),
            (jax.ShapeDtypeStruct((B, 2 * HALO, D), jnp.float32), both),
            (jax.ShapeDtypeStruct((B, HALO, D), jnp.float32), edge),
        ],
        [
            pltpu.VMEM((HALO, lanes), jnp.float32),
            pltpu.VMEM((2 * HALO, lanes), jnp.float32),
            pltpu.VMEM((HALO, lanes), jnp.float32),
        ],
    )
    sums, row = sums.sum(0), jnp.arange(HALO)[:, None]  # W rows of the weight, then those of the bias and of the norm's weight
    dweight = jnp.where(row < W, sums[:HALO], 0.0)
    dadded = pad_axis(sums[W : W + 2], 0, HALO)
    return dx, dweight, dadded, dinitial, None if seen is None else jnp.zeros_like(seen)


_conv.defvjp(_vjp_forward, _vjp_backward)
