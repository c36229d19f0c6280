"""Merging the recurrent states of chunks: mean, fusion (PICASO, arXiv 2502.17605), and the exact composition in order."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.layers.gka import GatedKalmaNet
from hybrid_jax.layers.mamba3 import Mamba3
from hybrid_jax.layers.recurrent import STATE_AXES
from hybrid_jax.parallel.recurrence import applied

# Mixer kind -> how its states can be composed. Keys of Mamba-3 are turned by angles that add up from a chunk's beginning, so that
# a mean or a sum of chunks' states means nothing; its states follow each other in order only.
COMPOSABLE: dict[str, tuple[str, ...]] = {
    "gka": ("kv_only", "soup", "fuse", "exact", "ordinary"),
    "gdn": ("kv_only", "soup", "fuse", "exact", "ordinary"),
    "mamba2": ("kv_only", "soup", "fuse", "exact", "ordinary"),
    "discrete_mamba2": ("kv_only", "soup", "fuse", "exact", "ordinary"),
    "mamba3": ("kv_only", "exact", "ordinary"),
}


class Group(NamedTuple):
    """Chunks of one length: `count` of every context.

    Attributes:
      inputs: [B * count, T, hidden], what the layer's mixer reads of them; the chunks of a context follow each other.
      state: what the mixer leaves of them behind the prefix, [B * count, ...].
    """

    count: int
    inputs: jax.Array
    state: Any


@dataclasses.dataclass(frozen=True)
class Read:
    """What a layer's mixer made of contexts.

    Args:
      empty: the mixer's state before any token, [B, ...], with room for all.
      groups: of the chunks, in order; none if nothing of the chunks is used.
      before: the state after the prefix, [B, ...]; that of no token without one.
      prefix: [B, P, hidden], what the mixer reads of the prefix; P may be 0.
      ordinary: the state after one ordinary pass over prefix and context; None if nothing of it is used.
    """

    empty: Any
    groups: tuple[Group, ...]
    before: Any
    prefix: jax.Array
    ordinary: Any

    def of(self, name: str) -> Read:
        """Returns the same of a part of the state, the field `name`."""
        groups = tuple(g._replace(state=getattr(g.state, name)) for g in self.groups)
        empty, before, ordinary = (None if s is None else getattr(s, name) for s in (self.empty, self.before, self.ordinary))
        return Read(empty, groups, before, self.prefix, ordinary)


def mean_products(transitions: jax.Array, matrices: bool) -> jax.Array:
    """Returns c_i [N, ...], the weights with which states of N chunks are fused.

    c_i is the mean over m = 0 ... N - 1 of the mean product of m transitions of the other chunks, of all choices of m, each in
    the order of the chunks. For numbers it is therefore the mean, over all orders of the chunks, of what later ones leave of a
    state; for matrices and N > 2 it takes one order of each choice, as published. The published code adds products up and divides
    by their number, in logarithms; here the means themselves are continued chunk by chunk. They stay within the range of the
    products, so that nothing overflows, and A = e^(sum of g) may be 0.

    Args:
      transitions: A_i, [N, ...] numbers or [N, ..., K, K] matrices.
      matrices: which of the two.
    """
    N = len(transitions)
    m = jnp.arange(N).reshape(-1, *[1] * (transitions.ndim - 1))
    one = jnp.eye(transitions.shape[-1]) if matrices else jnp.ones(())
    start = jnp.zeros((N, *transitions.shape[1:]), transitions.dtype).at[0].set(one)

    def weight(i):
        def with_one_more(means, j):
            A = transitions[j + (j >= i)]
            shorter = jnp.concatenate([jnp.zeros_like(means[:1]), means[:-1]])
            longer = jnp.matmul(A, shorter, precision="highest") if matrices else A * shorter
            share = m / (j + 1)  # of the choices of m of j + 1 chunks, those with the last one
            return (1 - share) * means + share * longer, None

        return jnp.mean(jax.lax.scan(with_one_more, start, jnp.arange(N - 1))[0], axis=0)

    return jax.lax.map(weight, jnp.arange(N))


def _by_context(group: Group, x: jax.Array) -> jax.Array:
    """Returns [B, count, ...] of [B * count, ...]."""
    return x.reshape(-1, group.count, *x.shape[1:])


def _all_chunks(read: Read, arrays: list[Any]) -> Any:
    """Returns [B, N, ...] of each group's pytree of [B * count, ...]."""
    by_context = [jax.tree.map(lambda x, g=g: _by_context(g, x), a) for g, a in zip(read.groups, arrays, strict=True)]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *by_context)


def _ones(x: jax.Array) -> jax.Array:
    return jnp.ones(x.shape[:2], jnp.int32)


def repeated(x: Any, count: int) -> Any:
    """Returns a state of [B * count, ...], every row of one of [B, ...] repeated in place."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0) if a.ndim else a, x)


def _is_state(mixer: Any) -> list[bool]:
    """Returns, for each field of the mixer's state, whether it is a recurrent state; the others are tails of convolutions."""
    return [axes == STATE_AXES for axes in mixer.state_axes()]


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x.astype(jnp.float32), axis=1).astype(x.dtype)


def _soup(read: Read) -> Any:
    return jax.tree.map(_mean, _all_chunks(read, [g.state for g in read.groups]))


def _transition(mixer: Any, read: Read) -> jax.Array:
    """Returns A [N, B, H] or [N, B, H, K, K] of every chunk with its copy of the prefix."""
    of_groups = []
    for g in read.groups:
        state = repeated(read.before, g.count)
        of_groups.append(mixer.summary(g.inputs, segment_ids=_ones(g.inputs), state=state)[0])
    A = jnp.moveaxis(_all_chunks(read, of_groups), 1, 0)
    if read.prefix.shape[1]:
        first = mixer.summary(read.prefix, segment_ids=_ones(read.prefix), state=read.empty)[0]
        A = jnp.matmul(A, first, precision="highest") if A.ndim == 5 else A * first
    return A


def _fuse(mixer: Any, read: Read) -> Any:
    """Gated KalmaNet: the sum, because H and S are sums over tokens; the others: the sum of c_i S_i, see `mean_products`."""
    stacked, states = _all_chunks(read, [g.state for g in read.groups]), _is_state(mixer)
    weights = None
    if not isinstance(mixer, GatedKalmaNet):
        A = _transition(mixer, read)
        weights = jnp.moveaxis(mean_products(A, A.ndim == 5), 0, 1)

    def fused(x):
        return jnp.sum(x if weights is None else applied(weights, x), axis=1)

    fields = zip(stacked, states, strict=True)
    return type(stacked)._make([None if x is None else fused(x) if state else _mean(x) for x, state in fields])


def _tails_before(before: jax.Array, own: jax.Array, length: int) -> jax.Array:
    """Returns the tail of a convolution before each of n chunks of `length` tokens, and after the last one, [B, n + 1, W - 1, D].

    Args:
      before: [B, W - 1, D], before the first.
      own: [B, n, W - 1, D], after each chunk behind the prefix; its last `length` tokens are the chunk's.
    """
    tails = [before]
    for i in range(own.shape[1]):
        both = jnp.concatenate([tails[-1], own[:, i, max(own.shape[2] - length, 0) :]], axis=1)
        tails.append(both[:, both.shape[1] - before.shape[1] :])
    return jnp.stack(tails, axis=1)


def _exact(mixer: Any, read: Read) -> Any:
    """Applies the chunks' affine maps S -> A S + b in order, each of inputs whose convolution reads on from the chunk before."""
    state, states = read.before, _is_state(mixer)
    for g in read.groups:
        T = g.inputs.shape[1]
        tails = [
            None if s or x is None else _tails_before(start, _by_context(g, x), T)
            for start, x, s in zip(state, g.state, states, strict=True)
        ]
        each = [x if t is None else t[:, :-1].reshape(x.shape) for x, t in zip(g.state, tails, strict=True)]
        maps = mixer.summary(g.inputs, segment_ids=_ones(g.inputs), state=type(state)._make(each))
        maps = jax.tree.map(lambda x, g=g: jnp.moveaxis(_by_context(g, x), 1, 0), maps)

        def then(S, one):
            return jax.tree.map(jnp.add, applied(one[0], S), one[1]), None

        after, _ = jax.lax.scan(then, tuple(x for x, s in zip(state, states, strict=True) if s), maps)
        new = iter(after)
        state = type(state)._make([next(new) if s else None if t is None else t[:, -1] for s, t in zip(states, tails, strict=True)])
    return state


def _exact_mamba3(mixer: Mamba3, read: Read) -> Any:
    state = read.before
    for g in read.groups:
        nothing = repeated(jax.tree.map(jnp.zeros_like, read.before), g.count)
        _, own = mixer(g.inputs, positions=_ones(g.inputs), segment_ids=_ones(g.inputs), state=nothing)
        pairs = jax.tree.map(lambda x, g=g: _by_context(g, x), (g.inputs, own))
        for i in range(g.count):
            state = mixer.composed(state, *jax.tree.map(lambda x, i=i: x[:, i], pairs))
    return state


def composed_states(mixer: Any, read: Read, how: str) -> Any:
    """Returns one recurrent state, [B, ...], of what a recurrent mixer made of contexts; `how` is of `composition.STATES`."""
    if how == "kv_only":
        return read.empty
    if how == "ordinary":
        return read.ordinary
    if how == "exact":
        return _exact_mamba3(mixer, read) if isinstance(mixer, Mamba3) else _exact(mixer, read)
    return _soup(read) if how == "soup" else _fuse(mixer, read)
