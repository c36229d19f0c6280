"""Reading contexts: all chunks as a batch through the layers, and merging what every layer's mixer leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.composition.caches import composed_keys
from hybrid_jax.composition.composition import Composition
from hybrid_jax.composition.states import Group, Read, composed_states, repeated
from hybrid_jax.layers.attention import Attention
from hybrid_jax.layers.bmojo import BMojoF, BMojoState
from hybrid_jax.layers.head_hybrid import HeadHybrid, HeadHybridState
from hybrid_jax.model import Decoder, Layer


def _composed(mixer: Any, read: Read, composition: Composition) -> Any:
    """Returns the mixer's one state of contexts, [B, ...]."""
    if isinstance(mixer, Attention):
        return composed_keys(read, composition.keys, windowed=mixer.window is not None)
    if isinstance(mixer, HeadHybrid):
        parts = (("recurrent", mixer.recurrent), ("attention", mixer.attention))
        return HeadHybridState(*(_composed(part, read.of(name), composition) for name, part in parts))
    if isinstance(mixer, BMojoF):
        windows = (composed_keys(read.of(name), composition.keys, windowed=True) for name in ("context", "fading"))
        return BMojoState(_composed(getattr(mixer, mixer.mixer_key), read.of("mixer"), composition), *windows)
    return composed_states(mixer, read, composition.states)


class _Tokens:
    """Rows of equal length on their way through the layers.

    Args:
      ids: [rows, T].
      first: the position of the first token.
    """

    def __init__(self, model: Decoder, ids: jax.Array, first: int):
        positions = jnp.broadcast_to(first + jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        self.hidden, self.at = model.inputs(ids, jnp.ones_like(ids), positions)

    def through(self, layer: Layer, state: Any) -> tuple[jax.Array, Any]:
        """Goes through a layer; returns what its mixer reads, [rows, T, hidden], and the state that it leaves."""
        inputs = layer.mixer_input(self.hidden)
        mixed, state = layer.mixer(layer.spec.kind)(inputs, **self.at, state=state)
        self.hidden = layer.behind_mixer(self.hidden, mixed).hidden
        return inputs, state


def read_contexts(
    model: Decoder, prefix: jax.Array, contexts: jax.Array, compositions: Sequence[Composition], slots: int
) -> list[Any]:
    """Returns the state after contexts, [B, ...] with caches of `slots` slots, by each composition.

    The chunks, which must be the same for all compositions, are read once; the prefix is read once for all chunks, whose states
    go on from its state.

    Args:
      prefix: ids [B, P]; P may be 0.
      contexts: ids [B, L].
    """
    (B, P), L, dtype = prefix.shape, contexts.shape[1], model.compute_dtype
    count, size, rest = compositions[0].chunks(L)
    begin, chunks = _Tokens(model, prefix, 0), []
    if any(c.reads_chunks for c in compositions):
        chunks.append((count, _Tokens(model, contexts[:, : count * size].reshape(B * count, size), P)))
        if rest:
            chunks.append((1, _Tokens(model, contexts[:, count * size :], P + size - rest)))
    all_tokens = None
    if any(c.keys == "full" for c in compositions):
        all_tokens = _Tokens(model, jnp.concatenate([prefix, contexts], axis=1), 0)
    found: list[list[Any]] = [[] for _ in compositions]
    for layer in model.layers:
        mixer = layer.mixer(layer.spec.kind)
        before, empty = mixer.init_state(B, P + size, dtype), mixer.init_state(B, slots, dtype)
        inputs = begin.hidden
        if P and chunks:
            inputs, before = begin.through(layer, before)
        groups = tuple(Group(n, *tokens.through(layer, repeated(before, n))) for n, tokens in chunks)
        ordinary = None if all_tokens is None else all_tokens.through(layer, empty)[1]
        read = Read(empty, groups, before, inputs, ordinary)
        for states, composition in zip(found, compositions, strict=True):
            states.append(_composed(mixer, read, composition))
    return [tuple(states) for states in found]
