"""Recurrent mixers on a mesh: rows and heads are sharded by the table, tokens by passing states.

With tokens sharded, every chunk of a row is summarized as the affine map that it applies to a state, S -> A S + b; an
exclusive scan of the maps over the mesh axis `seq` gives each chunk the state it starts from, and the operation
runs once more from there. Only states are sent, whatever the length of the row. One code path serves every mixer:
A is one number per head for scalar decays and K x K for the delta rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.sequence import as_chunks, as_rows, continued, exclusive_scan, from_pair, halo, halo_segments, to_pair
from hybrid_jax.parallel.sharding import TOKENS, axis_size, divides_heads, shard_map_by_axes
from kernels_pallas import (
    HeadNorm,
    linear_attention,
    linear_attention_step,
    linear_attention_summary,
    short_conv,
    short_conv_step,
)
from kernels_pallas.heads import repeat_heads
from kernels_pallas.short_conv.heads import norm_inputs, norm_outputs

HEADS, STATE, CHANNELS, REPLICATED = (*TOKENS, "heads"), ("batch", "heads"), ("heads",), (None,)


def _divisible(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the arrays, those of keys and values [B, T, heads, D] repeated to q's heads, the first array's, where the mesh axes
    of `heads` do not divide their own: a device needs complete groups."""
    H = arrays[0].shape[2]
    return [repeat_heads(x, H) if x.ndim == 4 and not divides_heads(x.shape[2]) else x for x in arrays]


def _axes_of(arrays: Sequence[jax.Array]) -> list[tuple[str | None, ...]]:
    return [CHANNELS if x.ndim == 1 else HEADS for x in arrays]


def applied(transition, state):
    """Returns A S for every state of a pytree; A is [..., H] or [..., H, K, K]."""

    def one(s):
        if transition.ndim == s.ndim:
            return jnp.matmul(transition, s, precision="highest")
        return transition[..., None, None] * s

    return jax.tree.map(one, state)


def _then(earlier, later):
    """Returns the affine map of `earlier` followed by `later`."""
    (A1, b1), (A2, b2) = earlier, later
    return applied(A2, A1) if A1.ndim == 5 else A2 * A1, jax.tree.map(jnp.add, applied(A2, b1), b2)


def incoming_states(summary: tuple, segment_ids: jax.Array) -> Any:
    """Returns the state each chunk starts from, [2, B, H, ...].

    Args:
      summary: (A, b) of each chunk from nothing, [2, B, H, ...]; A is 0 where a segment begins inside the chunk.
      segment_ids: [2, B, c].
    """
    link = continued(segment_ids)
    A, b = summary
    A = jnp.where(link.reshape(*link.shape, *[1] * (A.ndim - 2)), A, 0)
    _, before = exclusive_scan((A, b), _then)
    return jax.tree.map(lambda s: jnp.where(link[:, :, None, None, None], s, 0), before)


def _over_chunks(op, summary, segment_ids, *arrays):
    segments = to_pair(segment_ids)
    chunks = [x if x.ndim == 1 else as_rows(to_pair(x)) for x in arrays]
    ids = as_rows(segments)
    maps = jax.tree.map(as_chunks, summary(*chunks, segment_ids=ids))
    before = jax.tree.map(as_rows, incoming_states(maps, segments))
    return from_pair(as_chunks(op(*chunks, initial_state=before, segment_ids=ids)[0]))


def recurrence(
    op: Callable,
    step: Callable | None,
    summary: Callable | None,
    arrays: Sequence[jax.Array],
    *,
    state: Any,
    segment_ids: jax.Array,
    **optional: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Runs a recurrence over [B, T, H, ...] arrays, however they are sharded.

    Args:
      arrays: q [B, T, H, K] first; k and v may have fewer heads (see `kernels_pallas.heads`) and are sharded by them if the mesh
        divides them, else repeated before; numbers per head are [B, T, H], or [H] for all tokens.
      op: (*arrays, initial_state=, segment_ids=) -> (o, state).
      step: one token, (*arrays without T, state=) -> (o, state); None: there is never a state.
      summary: (*arrays, segment_ids=) -> (A [B,H] or [B,H,K,K], b): what the tokens make of a state; None: tokens are not sharded.
      state: a pytree of [B, H, ...], or None: from nothing, and no final state where tokens are sharded.
      optional: further arrays, which all three functions take by name; those that are None are left out.

    Raises:
      NotImplementedError: a state where tokens are sharded over the mesh.
    """
    given, count = {name: x for name, x in optional.items() if x is not None}, len(arrays)

    def by_name(function: Callable | None) -> Callable:
        assert function is not None
        return lambda *xs, **kw: function(*xs[:count], **dict(zip(given, xs[count:], strict=True)), **kw)

    op, arrays = by_name(op), _divisible([*arrays, *given.values()])
    if axis_size("seq") > 1:
        if state is not None:
            raise NotImplementedError("generation does not shard tokens over the mesh: give a mesh whose 'seq' is 1")
        local = functools.partial(_over_chunks, op, by_name(summary))
        return shard_map_by_axes(local, (segment_ids, *arrays), (TOKENS, *_axes_of(arrays)), HEADS), None
    if state is not None and step is not None and arrays[0].shape[1] == 1:
        axes = [CHANNELS if x.ndim == 1 else STATE for x in arrays]
        arrays = [x if x.ndim == 1 else x[:, 0] for x in arrays]

        def one(state, *arrays):
            return by_name(step)(*arrays, state=state)

        o, state = shard_map_by_axes(one, (state, *arrays), (STATE, *axes), (STATE, STATE))
        return o[:, None], state

    def all_tokens(state, segment_ids, *arrays):
        return op(*arrays, initial_state=state, segment_ids=segment_ids)

    return shard_map_by_axes(all_tokens, (state, segment_ids, *arrays), (STATE, TOKENS, *_axes_of(arrays)), (HEADS, STATE))


def linear_recurrence(
    arrays: Sequence[jax.Array],
    *,
    value_scale: jax.Array | None = None,
    own_scale: jax.Array | None = None,
    together: int = 1,
    skip: jax.Array | None = None,
    state: Any,
    segment_ids: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, Any]:
    """Runs `recurrence` for linear attention of scale 1, S <- e^g S + k v', o = S' q.

    Args:
      arrays: q, k, v [B, T, heads, ...] and log decays g [B, T, H].
      value_scale, own_scale, together, skip: as in `linear_attention`; one token that continues a state has no own_scale.
      state: S [B, H, K, V], or None, as in `recurrence`.
      implementation: of `linear_attention`.
    """

    def summary(q, k, v, g, *, own_scale=None, skip=None, **options):  # these two change no state
        del q, own_scale, skip
        return linear_attention_summary(k, v, g, **options)

    op = functools.partial(linear_attention, scale=1.0, together=together, implementation=implementation)
    step = functools.partial(linear_attention_step, scale=1.0)
    optional = dict(value_scale=value_scale, own_scale=own_scale, skip=skip)
    return recurrence(op, step, summary, arrays, state=state, segment_ids=segment_ids, **optional)


def _conv_over_chunks(segment_ids, x, weight, bias, norm_weight, *, activation, norm):
    width = weight.shape[1]
    segments, chunks = to_pair(segment_ids), to_pair(x)
    same = halo_segments(segments, width - 1) == segments[:, :, :1]
    same = jnp.flip(jnp.cumprod(jnp.flip(same, axis=2).astype(jnp.int32), axis=2), axis=2)
    before = as_rows(halo(chunks, width - 1) * same[..., None].astype(x.dtype))
    options: dict[str, Any] = dict(norm=norm, norm_weight=norm_weight, segment_ids=as_rows(segments))
    y, _ = short_conv(as_rows(chunks), weight, bias, activation, initial_state=norm_inputs(before, norm, norm_weight), **options)
    return from_pair(as_chunks(y))


def convolution(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    *,
    norm: HeadNorm | None = None,
    norm_weight: jax.Array | None = None,
    state: jax.Array | None,
    segment_ids: jax.Array,
) -> tuple[jax.Array, Any]:
    """The short conv of x [B, T, D] and its activation ("silu" or None), however it is sharded -> (y, state); D is sharded as
    heads are, as weight [D, W] is. The norm and its weight are those of `short_conv`."""
    if norm is not None and not divides_heads(x.shape[-1] // norm.dim):  # a device would have a part of a head
        x = norm_inputs(x, norm, norm_weight)
        y, state = convolution(x, weight, bias, activation, state=state, segment_ids=segment_ids)
        return norm_outputs(y, norm), state
    if axis_size("seq") > 1:
        axes = (TOKENS, HEADS, CHANNELS, CHANNELS, REPLICATED)
        local = functools.partial(_conv_over_chunks, activation=activation, norm=norm)
        return shard_map_by_axes(local, (segment_ids, x, weight, bias, norm_weight), axes, HEADS), None
    tail = ("batch", None, "heads")
    if state is not None and x.shape[1] == 1:

        def one(x, weight, bias, norm_weight, state):
            return short_conv_step(x, weight, bias, activation, norm=norm, norm_weight=norm_weight, state=state)

        axes = (STATE, CHANNELS, CHANNELS, REPLICATED, tail)
        y, state = shard_map_by_axes(one, (x[:, 0], weight, bias, norm_weight, state), axes, (STATE, tail))
        return y[:, None], state

    def all_tokens(segment_ids, x, weight, bias, norm_weight, state):
        options: dict[str, Any] = dict(norm=norm, norm_weight=norm_weight, initial_state=state, segment_ids=segment_ids)
        return short_conv(x, weight, bias, activation, **options)

    arrays = (segment_ids, x, weight, bias, norm_weight, state)
    return shard_map_by_axes(all_tokens, arrays, (TOKENS, HEADS, CHANNELS, CHANNELS, REPLICATED, tail), (HEADS, tail))
