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

The kernels compute the transposes of these arrays, with the tokens in lanes (`mosaic_chunk.py`): M' is `Decay.mask`, and the
forward kernel keeps the state as S' [V,K], S the H above.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import mosaic, mosaic_chunk
from kernels_pallas.arguments import differentiable
from kernels_pallas.linear_attention.composed import composed
from kernels_pallas.mosaic_chunk import (
    NT,
    Decay,
    column_sum,
    dot,
    dot_parts,
    each,
    earlier,
    head_columns,
    head_slices,
    iota,
    row_sum,
    store_tokens,
    sums_of_rows,
)
from kernels_pallas.operands import operand_dtype, parts

HEADS = 8  # at most this many heads per grid step


def _forward_kernel(q, k, v, rows, initial, *rest, heads, groups, scale, packed, scaled, owned, together, skips):
    skip, o, final, *saved, state = rest if skips else (None, *rest)
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        for h in range(heads):
            state[h] = initial[0, h].T

    low = k.dtype
    Q, K, V = head_slices(q, heads), head_slices(k, heads, groups[0]), head_columns(v, heads, groups[1])
    decay = _decays(rows, heads, packed, scaled, owned, together)[0]
    S = [state[h] for h in range(heads)]
    S_low = each(lambda s: s.astype(low), S)
    if saved:
        for h in range(heads):
            saved[0][0, 0, h] = S_low[h].T
    store_tokens(o, _add_skip(read(Q, K, V, S_low, decay), skip, V), scale)
    for h, new in enumerate(write(K, V, S, decay)):
        state[h] = new

    @pl.when(last)
    def _():
        for h in range(heads):
            final[0, h] = state[h].T


def _decays(rows, heads, packed, scaled, owned, together) -> tuple[list[Decay], list[Decay], list[jax.Array]]:
    """Returns every head's decays with the scales in `mask` and `keep`, if there are any; what multiplies `value_scale` there; and
    `value_scale` as rows [1,C], if there is one."""
    decay, scales = mosaic_chunk.chunk_scalars(rows, heads, packed, further=scaled + owned)
    unscaled = decay
    if scaled:
        columns = mosaic_chunk.as_columns(scales[:heads])
        decay = each(lambda d, c, w: d._replace(mask=d.mask * c, keep=d.keep * w), decay, columns, scales[:heads])
    if owned:
        own, values = _one_step(decay[0].mask.shape, together), scales[-heads:]
        if together > 1:  # else a token's row is its column
            values = mosaic_chunk.as_columns(values)
        decay = each(lambda d, u: d._replace(mask=jnp.where(own, u, d.mask)), decay, values)
        unscaled = each(lambda d: d._replace(mask=jnp.where(own, 0.0, d.mask)), unscaled)
    return decay, unscaled, scales[:heads]


def _one_step(shape: tuple[int, ...], together: int) -> jax.Array:
    """Returns where two tokens are of one step, which has `together` tokens: [C,C] as a mask's."""
    return iota(shape, 0) // together == iota(shape, 1) // together


def _add_skip(x: Sequence[jax.Array], skip: jax.Ref | None, v: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns x + d v of every head, d those of the grid step's heads in `skip` [H]; x if there is no skip."""
    if skip is None:
        return x
    d = [skip[pl.program_id(1) * len(x) + h] for h in range(len(x))]
    return each(lambda x, d, v: x + d * v.astype(jnp.float32), x, d, v)


def read(
    Q: Sequence[jax.Array], K: Sequence[jax.Array], V: Sequence[jax.Array], S: Sequence[jax.Array], decay: Sequence[Decay]
) -> list[jax.Array]:
    """Returns every head's O' [V,C], float32, from rows Q, K [C,K], and V' [V,C] and the state S' [V,K] transposed."""
    scores = each(lambda q, k, d: (dot(k, q, NT) * d.mask).astype(k.dtype), Q, K, decay)
    return each(lambda q, v, s, x, d: d.reach * dot(s, q, NT) + dot(v, x), Q, V, S, scores, decay)


def write(K: Sequence[jax.Array], V: Sequence[jax.Array], S: Sequence[jax.Array], decay: Sequence[Decay]) -> list[jax.Array]:
    """Returns every head's new state S' [V,K], float32; the arguments are as in `read`."""
    update = each(lambda k, v, d: dot((d.keep * v).astype(k.dtype), k), K, V, decay)
    return each(lambda s, u, d: d.total * s + u, S, update, decay)


class Gradients(NamedTuple):
    """One head's gradients of `read` and `write`, and what those of the decays and the other scalars are made of, float32.

    Attributes:
      dQ, dK: [K,C].
      dV: [V,C].
      dS: [K,V].
      pairs: [C,C], at [i,t] what e^{a_t - a_i} multiplies, i < t: da gains its columns' sums and loses its rows'.
      da: [1,C], all else that da gains.
      scores, dscores: [C,C], K Q' and V dO', at [i,t].
      kept: [1,C], dS of k v'.
    """

    dQ: jax.Array
    dK: jax.Array
    dV: jax.Array
    dS: jax.Array
    pairs: jax.Array
    da: jax.Array
    scores: jax.Array
    dscores: jax.Array
    kept: jax.Array


class Tokens(NamedTuple):
    """The tokens of every head, lists as `each` takes them: K, V, dO in rows; Qt, Kt, dOt with the tokens in lanes."""

    Qt: Sequence[jax.Array]
    K: Sequence[jax.Array]
    Kt: Sequence[jax.Array]
    V: Sequence[jax.Array]
    dO: Sequence[jax.Array]
    dOt: Sequence[jax.Array]


def read_write_backward(
    x: Tokens,
    S: Sequence[jax.Array],
    dS: Sequence[jax.Array],
    decay: Sequence[Decay],
    low: DTypeLike,
    n: int = 1,
    together: int = 1,
) -> list[Gradients]:
    """Returns the gradients of `read` and `write` for every head.

    Args:
      x: in `low`; Qt and dO also in float32, which is then used in two parts.
      S: the states before the chunk [K,V], likewise.
      dS: the gradients of those after it [K,V], float32.
      n: the number of parts in which intermediate results are multiplied again.
      together: of `linear_attention`; no decay reaches what tokens of one step have of each other.
    """
    Q2, S2, O2, Ot2 = (each(lambda a: parts(a, low), arrays) for arrays in (x.Qt, S, x.dO, x.dOt))
    scores = each(lambda k, q: dot_parts((k,), q), x.K, Q2)
    dscores = each(lambda v, o: dot_parts((v,), o, NT), x.V, O2)
    masked = each(lambda s, d: s * d.mask, scores, decay)
    pairs = each(lambda s, ds: earlier(s * ds, together), masked, dscores)
    masked = each(lambda s: parts(s, low, n), masked)
    dmasked = each(lambda ds, d: parts(ds * d.mask, low, n), dscores, decay)
    dS2 = each(lambda s: parts(s, low, n), dS)
    dV = each(lambda o, s: dot_parts(o, s, NT), Ot2, masked)
    dV = each(lambda a, s, k, d: a + d.keep * dot_parts(tuple(map(jnp.transpose, s)), (k,), NT), dV, dS2, x.K, decay)
    across = each(lambda s, o, d: d.reach * dot_parts(s, o, NT), S2, O2, decay)
    dQ = each(lambda a, k, ds: a + dot_parts((k,), ds), across, x.Kt, dmasked)
    kept = each(lambda s, v: dot_parts(s, (v,), NT), dS2, x.V)
    dK = each(lambda a, q, ds, d: d.keep * a + dot_parts(q, ds, NT), kept, Q2, dmasked, decay)
    reached = each(lambda q, d: parts(d.reach * q, low, n), x.Qt, decay)
    dS0 = each(lambda s, q, o, d: d.total * s + dot_parts(q, o), dS, reached, O2, decay)
    kept = each(lambda a, k: column_sum(a * k), kept, x.Kt)
    da = each(lambda a, q: column_sum(a * q), across, x.Qt)
    da = each(decay_gradient, da, kept, dS, S, decay)
    return each(Gradients, dQ, dK, dV, dS0, pairs, da, scores, dscores, kept)


def decay_gradient(across: jax.Array, kept: jax.Array, dS: jax.Array, S: jax.Array, decay: Decay) -> jax.Array:
    """Returns what da [1,C] gains but for pairs of tokens.

    Args:
      across: [1,C], of reading the state before the chunk.
      kept: [1,C], of writing the one after it, without `keep`.
      dS, S: the gradient of the state after the chunk and the state before it.
    """
    kept = decay.keep * kept
    at_end = row_sum(kept) + decay.total * row_sum(column_sum(dS * S))
    end = iota(kept.shape, 1) == kept.shape[1] - 1
    return across - kept + jnp.where(end, at_end, 0.0)


def _backward_kernel(q, k, v, rows, before, do, dfinal, *rest, heads, groups, scale, packed, scaled, owned, together, skips):
    skip, dq, dk, dv, dscalars, dinitial, state = rest if skips else (None, *rest)
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        state[...] = dfinal[0] / scale

    K, V, dO = (head_slices(x, heads, n) for x, n in zip((k, v, do), (*groups, 1), strict=True))
    S, dS = [before[0, 0, h] for h in range(heads)], [state[h] for h in range(heads)]
    decay, unscaled, scales = _decays(rows, heads, packed, scaled, owned, together)
    tokens = Tokens(head_columns(q, heads), K, head_columns(k, heads, groups[0]), V, dO, head_columns(do, heads))
    found = read_write_backward(tokens, S, dS, decay, k.dtype, together=together)
    for ref, values, n in (
        (dq, [g.dQ for g in found], 1),
        (dk, [g.dK for g in found], groups[0]),
        (dv, _add_skip([g.dV for g in found], skip, tokens.dOt), groups[1]),
    ):
        store_tokens(ref, values, scale, n)
    da, scalars = each(lambda g: g.da + column_sum(g.pairs), found), []
    own = _one_step(decay[0].mask.shape, together)
    of_own = each(lambda g: jnp.where(own, g.scores * g.dscores, 0.0), found)
    of_own = each(column_sum, of_own) if together == 1 else sums_of_rows(of_own)
    if scaled:  # the pairs are value_scale times what it multiplies, and so are the sums over those who read
        read_by_others = sums_of_rows(each(lambda g, d: earlier(g.scores * d.mask * g.dscores, together), found, unscaled))
        da = each(lambda a, w, r: a - w * r, da, scales, read_by_others)
        scalars += each(lambda r, g, d, o: r + d.keep * g.kept + (0.0 if owned else o), read_by_others, found, unscaled, of_own)
    else:
        da = each(jnp.subtract, da, sums_of_rows([g.pairs for g in found]))
    if owned:
        scalars += of_own
    if skips:
        diagonal = _one_step(decay[0].mask.shape, 1)
        scalars += each(lambda g: column_sum(jnp.where(diagonal, g.dscores, 0.0)), found)
    mosaic_chunk.store_rows(dscalars, [*da, *scalars], scale)
    for h in range(heads):
        state[h] = found[h].dS

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
        [pltpu.VMEM((grid.heads, grid.V, grid.K), jnp.float32)],
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
