"""Pallas kernels for TPU: one sweep over the chunks forward, one backward, the state in VMEM.

Forward, a chunk of C rows (letters of `chunks.py`):

    O = scale [reach (Q H0) + ((Q K') M) V],     H1 = total H0 + (keep K)' V

Backward, from the last chunk to the first, with dH the gradient of the state at the chunk's end:

    dQ = reach (dO H0') + ((dO V') M) K          dK = keep (V dH') + ((dO V') M)' Q
    dV = ((Q K') M)' dO + keep (K dH)            dH <- total dH + (reach Q)' dO

and the gradient of the cumulative decays a: what each term multiplies, e^{a_t - a_i} adding to row t and
taking from row i. The diagonal, where the two cancel, is left out, so strong decays lose nothing.
dO is not multiplied by the scale, which would round it: all gradients are, and dH at the end is divided.

`value_scale` w multiplies the columns of M and `keep`, so that V stays v above; d v, d of `skip`, is added to O and d dO to dV:

    dw = columns of (Q K') (dO V') M + rows of keep (V dH') K          dd = sum of the diagonal of dO V'

`own_scale` u replaces M where a token reads its own step, which no decay reaches; then dw does not have these entries of M, and

    du = columns of (Q K') (dO V') where a token reads its own step

k, v of fewer heads are read once per group, their gradients added up in float32 before they are rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import mosaic
from kernels_pallas.arguments import differentiable
from kernels_pallas.linear_attention.composed import composed
from kernels_pallas.mosaic import NT, TN, Decay, dot, dot_parts, each, head_slices, iota, row_sum, store_heads
from kernels_pallas.operands import operand_dtype, parts

HEADS = 8  # at most this many heads per grid step


def _forward_kernel(q, k, v, rows, initial, *rest, heads, groups, scale, packed, scaled, owned, together, skips):
    skip, o, final, *saved, state = rest if skips else (None, *rest)
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        state[...] = initial[0]

    Q, K, V = (head_slices(x, heads, n) for x, n in zip((q, k, v), (1, *groups), strict=True))
    decay = _decays(rows, heads, packed, scaled, owned, together)[0]
    H0 = [state[h] for h in range(heads)]
    low = each(lambda h: h.astype(k.dtype), H0)
    if saved:
        for h in range(heads):
            saved[0][0, 0, h] = low[h]
    store_heads(o, _add_skip(read(Q, K, V, low, decay), skip, V), scale)
    for h, H1 in enumerate(write(K, V, H0, decay)):
        state[h] = H1

    @pl.when(last)
    def _():
        final[0] = state[...]


def _decays(rows, heads, packed, scaled, owned, together) -> tuple[list[Decay], list[Decay]]:
    """Returns every head's decays with the scales in `mask` and `keep`, if there are any, and those that multiply `value_scale`."""
    decay, scales = mosaic.chunk_scalars(rows, heads, packed, further=scaled + owned)
    unscaled = decay

    def as_row(kind):
        return [rows[0, 0, 0, kind * heads + h : kind * heads + h + 1, :] for h in range(heads)]

    if scaled:
        decay = each(lambda d, r, w: d._replace(mask=d.mask * r, keep=d.keep * w), decay, as_row(2), scales[:heads])
    if owned:
        own = _steps(rows.shape[4], together, jnp.equal)
        decay = each(lambda d, r: d._replace(mask=jnp.where(own, r, d.mask)), decay, as_row(2 + scaled))
        unscaled = each(lambda d: d._replace(mask=jnp.where(own, 0.0, d.mask)), unscaled)
    return decay, unscaled


def _steps(C: int, together: int, compare: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Returns the comparison of each row's step with each column's, [C, C]; a step has `together` tokens."""
    row, column = (iota((C, C), axis) // together if together > 1 else iota((C, C), axis) for axis in (0, 1))
    return compare(row, column)


def _add_skip(x: Sequence[jax.Array], skip: jax.Ref | None, v: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns x + d v of every head, d those of the grid step's heads in `skip` [H]; x if there is no skip."""
    if skip is None:
        return x
    d = [skip[pl.program_id(1) * len(x) + h] for h in range(len(x))]
    return each(lambda x, d, v: x + d * v.astype(jnp.float32), x, d, v)


def read(
    Q: Sequence[jax.Array], K: Sequence[jax.Array], V: Sequence[jax.Array], H0: Sequence[jax.Array], decay: Sequence[Decay]
) -> list[jax.Array]:
    """Returns reach (Q H0) + ((Q K') M) V for every head, float32."""
    scores = each(lambda q, k, d: (dot(q, k, NT) * d.mask).astype(k.dtype), Q, K, decay)
    across = each(lambda q, h, d: d.reach * dot(q, h), Q, H0, decay)
    return each(lambda a, s, v: a + dot(s, v), across, scores, V)


def write(K: Sequence[jax.Array], V: Sequence[jax.Array], H0: Sequence[jax.Array], decay: Sequence[Decay]) -> list[jax.Array]:
    """Returns total H0 + (keep K)' V for every head, float32."""
    update = each(lambda k, v, d: dot((k * d.keep).astype(k.dtype), v, TN), K, V, decay)
    return each(lambda h, u, d: d.total * h + u, H0, update, decay)


def read_write_backward(
    Q: Sequence[jax.Array],
    K: Sequence[jax.Array],
    V: Sequence[jax.Array],
    H0: Sequence[jax.Array],
    dO: Sequence[jax.Array],
    dH: Sequence[jax.Array],
    decay: Sequence[Decay],
    low: DTypeLike,
    n: int = 1,
) -> tuple[list[jax.Array], ...]:
    """Returns the gradients of `read` and `write` for every head.

    Args:
      Q, K, V, H0: in `low`, or in float32, which is then used in two parts.
      dO: cotangents of `read`, likewise.
      dH: those of `write`'s states, float32.
      n: the number of parts in which intermediate results are multiplied again.

    Returns:
      dQ, dK, dV, dH0 in float32, and da as a column [C,1] and a row [1,C] to be added.
    """
    return scaled_backward(Q, K, V, H0, dO, dH, decay, decay, low, n)[:6]


def scaled_backward(
    Q: Sequence[jax.Array],
    K: Sequence[jax.Array],
    V: Sequence[jax.Array],
    H0: Sequence[jax.Array],
    dO: Sequence[jax.Array],
    dH: Sequence[jax.Array],
    decay: Sequence[Decay],
    unscaled: Sequence[Decay],
    low: DTypeLike,
    n: int = 1,
    together: int = 1,
) -> tuple[list[jax.Array], ...]:
    """Returns what `read_write_backward` does; the gradient of `value_scale` as a column and a row; that of `own_scale` as a row;
    and dO V' on its diagonal.

    Args:
      decay: with the scales in `mask` and `keep`.
      unscaled: what multiplies `value_scale` there.
      together: of `linear_attention`.
    """
    C = Q[0].shape[0]
    Q2, K2, V2, H2, O2 = (each(lambda x: parts(x, low), xs) for xs in (Q, K, V, H0, dO))
    scores = each(lambda q, k, d: dot_parts(q, k, NT) * d.mask, Q2, K2, decay)
    dscores = each(lambda o, v: dot_parts(o, v, NT), O2, V2)
    strict, diagonal = _steps(C, together, jnp.greater), iota((C, C), 0) == iota((C, C), 1)
    E = each(lambda s, ds: jnp.where(strict, s * ds, 0.0), scores, dscores)
    of_scale = each(
        lambda q, k, d, ds: jnp.sum(dot_parts(q, k, NT) * d.mask * ds, axis=0, keepdims=True), Q2, K2, unscaled, dscores
    )
    step = _steps(C, together, jnp.equal)
    of_own = each(lambda q, k, ds: jnp.sum(jnp.where(step, dot_parts(q, k, NT) * ds, 0.0), axis=0, keepdims=True), Q2, K2, dscores)
    own = each(lambda ds: jnp.sum(jnp.where(diagonal, ds, 0.0), axis=0, keepdims=True), dscores)
    dscores = each(lambda ds, d: parts(ds * d.mask, low, n), dscores, decay)
    scores = each(lambda s: parts(s, low, n), scores)
    dH2 = each(lambda h: parts(h, low, n), dH)
    across = each(lambda o, h, d: d.reach * dot_parts(o, h, NT), O2, H2, decay)
    kept = each(lambda v, h, d: d.keep * dot_parts(v, h, NT), V2, dH2, decay)
    dV = each(lambda s, o, k, h, d: dot_parts(s, o, TN) + d.keep * dot_parts(k, h), scores, O2, K2, dH2, decay)
    dQ = each(lambda a, ds, k: a + dot_parts(ds, k), across, dscores, K2)
    dK = each(lambda a, ds, q: a + dot_parts(ds, q, TN), kept, dscores, Q2)
    reached = each(lambda q, d: parts(d.reach * q, low, n), Q, decay)
    dH0 = each(lambda h, q, o, d: d.total * h + dot_parts(q, o, TN), dH, reached, O2, decay)
    kept = each(lambda a, k: row_sum(a * k), kept, K)
    column = each(lambda e, a, q, b: row_sum(e) + row_sum(a * q) - b, E, across, Q, kept)
    end = iota((1, C), 1) == C - 1

    def row(e, b, h, h0, d):
        at_end = jnp.sum(b, axis=0, keepdims=True) + d.total * jnp.sum(row_sum(h * h0), axis=0, keepdims=True)
        return jnp.where(end, at_end, 0.0) - jnp.sum(e, axis=0, keepdims=True)

    of_keep = each(lambda v, h, k, d: d.keep * row_sum(dot_parts(v, h, NT) * k), V2, dH2, K, unscaled)
    return dQ, dK, dV, dH0, column, each(row, E, kept, dH, H0, decay), of_keep, of_scale, of_own, own


def _backward_kernel(q, k, v, rows, before, do, dfinal, *rest, heads, groups, scale, packed, scaled, owned, together, skips):
    skip, dq, dk, dv, dscalars, dinitial, state = rest if skips else (None, *rest)
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        state[...] = dfinal[0] / scale

    Q, K, V, dO = (head_slices(x, heads, n) for x, n in zip((q, k, v, do), (1, *groups, 1), strict=True))
    H0, dH = [before[0, 0, h] for h in range(heads)], [state[h] for h in range(heads)]
    decay = _decays(rows, heads, packed, scaled, owned, together)
    of_all = scaled_backward(Q, K, V, H0, dO, dH, *decay, k.dtype, together=together)
    dQ, dK, dV, dH0, column, row, of_keep, of_scale, of_own, own = of_all
    for ref, values, n in ((dq, dQ, 1), (dk, dK, groups[0]), (dv, _add_skip(dV, skip, dO), groups[1])):
        store_heads(ref, values, scale, n)
    mosaic.store_rows(dscalars, column + of_keep * scaled, row + of_scale * scaled + of_own * owned + own * skips, scale)
    for h in range(heads):
        state[h] = dH0[h]

    @pl.when(last)
    def _():
        dinitial[0] = scale * state[...]


def linear_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    value_scale: jax.Array | None,
    own_scale: jax.Array | None,
    skip: jax.Array | None,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
    together: int,
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `linear_attention`; see `kernels_pallas.contract`."""
    if mosaic.LANES % together:  # a step would be in two chunks

        def run(q, k, v, g, state, segments, scale, chunk_size):
            return linear_attention_tpu(q, k, v, g, None, None, None, state, segments, scale, chunk_size, 1)

        plain = composed(run)
        return plain(q, k, v, log_decay, value_scale, own_scale, skip, state, segments, scale, chunk_size, together)
    low = operand_dtype(q, k, v)
    arrays = (x.astype(low) for x in (q, *mosaic.complete_groups(q, k, v, HEADS)))
    o, final = _linear_attention(*arrays, log_decay, value_scale, own_scale, skip, state, segments, scale, together)
    return o.astype(v.dtype), final


@differentiable(9, 10)
def _linear_attention(
    q, k, v, log_decay, value_scale, own_scale, skip, state, segments, scale, together
) -> tuple[jax.Array, jax.Array]:
    scalars = log_decay, value_scale, own_scale, skip
    return _run_forward(q, k, v, *scalars, state, segments, scale, together, save=False)[0]


def _prepare(q, k, v, log_decay, value_scale, own_scale, skip, segments, scale, together, reverse=False):
    """Returns the grid, the first inputs of both kernels, their last one if there is a skip, and their static arguments."""
    groups = mosaic.groups_of(q, k, v)
    grid = mosaic.grid_of(q, v, HEADS, reverse, groups)
    given = [x for x in (value_scale, own_scale) if x is not None]
    inputs = mosaic.token_inputs(grid, q, k, v, mosaic.chunk_rows(log_decay, segments, grid.C, grid.heads, *given))
    skips = []
    if skip is not None:  # divided, because the scale multiplies the sum
        skips.append((skip.astype(jnp.float32) / scale, pl.BlockSpec(memory_space=pltpu.SMEM)))
    static = dict(heads=grid.heads, groups=groups, scale=scale, packed=segments is not None, together=together)
    given = dict(scaled=value_scale is not None, owned=own_scale is not None, skips=bool(skips))
    return grid, inputs, skips, static | given


def _run_forward(q, k, v, log_decay, value_scale, own_scale, skip, state, segments, scale, together, save):
    (_, T, H, _), (K, V) = q.shape, state.shape[2:]
    grid, inputs, skips, static = _prepare(q, k, v, log_decay, value_scale, own_scale, skip, segments, scale, together)
    outputs = [
        (grid.tokens_shape(grid.V, v.dtype), grid.tokens(grid.V)),
        (grid.state_shape(grid.K, grid.V), grid.state(grid.K, grid.V)),
    ]
    if save:
        outputs.append((grid.states_shape(grid.K, grid.V, k.dtype), grid.states(grid.K, grid.V)))
    o, final, *saved = mosaic.run(
        functools.partial(_forward_kernel, **static),
        grid,
        "linear_attention_forward",
        [*inputs, (mosaic.pad_state(state), grid.state(grid.K, grid.V)), *skips],
        outputs,
        [pltpu.VMEM((grid.heads, grid.K, grid.V), jnp.float32)],
    )
    return (mosaic.head_tokens(o, T, H, V), final[:, :, :K, :V]), saved


def _vjp_forward(q, k, v, log_decay, value_scale, own_scale, skip, state, segments, scale, together):
    arrays = q, k, v, log_decay, value_scale, own_scale, skip
    out, (before,) = _run_forward(*arrays, state, segments, scale, together, save=True)
    return out, (*arrays, segments, before)


def _vjp_backward(scale, together, saved, cotangents):
    q, k, v, log_decay, value_scale, own_scale, skip, segments, before = saved
    do, dfinal = cotangents
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    given = log_decay, value_scale, own_scale, skip
    grid, inputs, skips, static = _prepare(q, k, v, *given, segments, scale, together, reverse=True)
    values, state = grid.tokens(grid.V), grid.state(grid.K, grid.V)
    scalars = sum(x is not None for x in given)
    dq, dk, dv, dscalars, dinitial = mosaic.run(
        functools.partial(_backward_kernel, **static),
        grid,
        "linear_attention_backward",
        [
            *inputs,
            (before, grid.states(grid.K, grid.V)),
            (mosaic.flat_tokens(do, grid.C), values),
            (mosaic.pad_state(dfinal), state),
            *skips,
        ],
        [
            *mosaic.gradient_outputs(grid, q, k, v, scalars),
            (grid.state_shape(grid.K, grid.V), state),
        ],
        [pltpu.VMEM((grid.heads, grid.K, grid.V), jnp.float32)],
    )
    of_scalar = functools.partial(mosaic.from_rows, dscalars, grid.heads, T)
    dskip = None if skip is None else (jnp.sum(of_scalar(kind=scalars - 1), axis=(0, 1)) / scale).astype(skip.dtype)
    return (
        *mosaic.token_gradients(dq, dk, dv, q, v),
        mosaic.decay_gradient(dscalars, grid.heads, T).astype(log_decay.dtype),
        None if value_scale is None else of_scalar(kind=1).astype(value_scale.dtype),
        None if own_scale is None else of_scalar(kind=1 + (value_scale is not None)).astype(own_scale.dtype),
        dskip,
        dinitial[:, :, :K, :V],
        None,
    )


_linear_attention.defvjp(_vjp_forward, _vjp_backward)
