"""Composed contexts for decoding: the state after them, the scores of what follows, and generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.checks import check_integer
from hybrid_jax.composition.composition import Composition
from hybrid_jax.composition.reading import read_contexts
from hybrid_jax.generation import SLOTS, Sampling, check_prompts, decode, end_ids
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import join_model, split_model

Parameters = Mapping[str, jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _read(
    structure: nnx.GraphDef, parameters: Parameters, prefix: Any, contexts: Any, compositions: tuple[Composition, ...], slots: int
) -> list[Any]:
    return read_contexts(join_model(structure, parameters), prefix, contexts, compositions, slots)


def _after(structure: nnx.GraphDef, parameters: Parameters, ids: jax.Array, first: Any, state: Any) -> tuple[Decoder, Any, Any]:
    """Returns the model, the final states [B, Q, hidden] of ids [B, Q] behind a state, from position `first`, and the state."""
    model = join_model(structure, parameters)
    positions = jnp.broadcast_to(first + jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return model, *model.hidden_states(ids, jnp.ones_like(ids), positions, state)


@functools.partial(jax.jit, static_argnums=0)
def _question(structure: nnx.GraphDef, parameters: Parameters, ids: Any, first: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns the logits [B, vocab] after the question, and the state."""
    model, hidden, state = _after(structure, parameters, ids, first, state)
    return model.head(hidden[:, -1]), state


@functools.partial(jax.jit, static_argnums=0)
def _scores(structure: nnx.GraphDef, parameters: Parameters, ids: Any, first: Any, state: Any) -> tuple[jax.Array, jax.Array]:
    model, hidden, _ = _after(structure, parameters, ids, first, state)
    best = top_k_tokens(hidden[:, :-1], model.head, 1)[0][..., 0]
    return cross_entropy(hidden[:, :-1], model.head, ids[:, 1:]), best == ids[:, 1:]


def _ids(name: str, ids: Any, model: Decoder) -> np.ndarray:
    """Returns token ids [B, T] as an array; [T] is one row.

    Raises:
      ValueError: they are not integers in one or two dimensions, or outside the vocabulary.
    """
    array = np.asarray(ids)
    array = array.reshape(-1, array.shape[-1]) if array.ndim in (1, 2) and array.size else array
    if array.size and (array.ndim != 2 or array.dtype.kind not in "iu"):
        raise ValueError(f"the {name} must be integer token ids [T] or [B, T], got an array {array.shape} of {array.dtype}")
    if not array.size:
        return np.zeros((1, 0), np.int32)
    if array.min() < 0 or array.max() >= model.config.vocab_size:
        raise ValueError(f"the {name} has a token id outside 0 ... {model.config.vocab_size - 1}; is it this model's tokenizer?")
    return array.astype(np.int32)


def compose(
    model: Decoder,
    context: Any,
    compositions: Sequence[Composition],
    *,
    prefix: Any = (),
    after: int,
) -> list[tuple[Any, int]]:
    """Reads a context in chunks and composes what they leave.

    Args:
      context: token ids [L], or [B, L] of several contexts of one length.
      compositions: how, each on the same chunks; the chunks are read once for all.
      prefix: token ids [P] or [B, P] that stand before every chunk; may be empty.
      after: tokens for which caches have room behind the context: of question and answer.

    Returns:
      For each composition the state, [B, ...], and the position of the token that follows.

    Raises:
      ValueError: bad ids, no context, compositions of different chunks, or what `Composition.check` and `check_positions` refuse.
    """
    ids, before = _ids("context", context, model), _ids("prefix", prefix, model)
    if len(before) not in (1, len(ids)):
        raise ValueError(f"the prefix has {len(before)} rows, the context {len(ids)}; give one row, or as many")
    before = np.broadcast_to(before, (len(ids), before.shape[1]))
    P, L = before.shape[1], ids.shape[1]
    if not compositions or len({c.chunk for c in compositions}) > 1:
        raise ValueError("compose needs at least one composition, all with chunks of one size")
    if not L:
        raise ValueError("the context is empty; a composition needs at least one token to read in chunks")
    check_integer("after", after, minimum=1)
    for composition in compositions:
        composition.check(model.config)
        composition.check_positions(model.config, P, L, after)
    slots = -(-(P + L + after) // SLOTS) * SLOTS
    states = _read(*split_model(model), before, ids, tuple(compositions), slots)
    return [(state, c.begin_of_question(P, L)) for state, c in zip(states, compositions, strict=True)]


def composed_scores(model: Decoder, follow: Any, composed: tuple[Any, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the losses (nats) of tokens that follow a composed context, and whether each was the most likely one.

    Args:
      follow: token ids [B, Q].
      composed: state and position, of `compose`.

    Returns:
      Two arrays [B, Q], whose first place, which no token of `follow` predicts, is 0.
    """
    state, first = composed
    scores = _scores(*split_model(model), _ids("question", follow, model), first, state)
    losses, right = (np.pad(np.asarray(x), ((0, 0), (1, 0))) for x in scores)
    return losses, right


def generate_composed(
    model: Decoder,
    context: Any,
    question: Sequence[int],
    *,
    composition: Composition,
    prefix: Any = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> list[int]:
    """Continues prefix + context + question, reading the context in chunks; on one device.

    Args:
      context: token ids [L].
      question: token ids, at least one; it is read once, behind the composed context.
      composition: how the chunks are composed.
      prefix: token ids that stand before every chunk; may be empty.
      max_new_tokens, temperature, top_p, top_k, eos_id, seed, on_token: as in `generate`.

    Returns:
      The new ids.

    Raises:
      ValueError: an empty context or question, what `compose` refuses, or a bad option.
    """
    sampling, ends = Sampling(temperature, top_p, top_k), end_ids(model.config, eos_id)
    (asked,) = check_prompts(model.config, [question], max_new_tokens)
    if np.ndim(context) != 1 or not len(context):
        raise ValueError(f"generate_composed continues one context, token ids [L] and at least one, got {np.shape(context)}")
    ((state, first),) = compose(model, context, [composition], prefix=prefix, after=len(asked) + max_new_tokens)
    structure, parameters = split_model(model)
    logits, state = _question(structure, parameters, np.asarray(asked, np.int32)[None], first, state)
    position = np.full((1, 1), first + len(asked) - 1, np.int32)
    options: dict[str, Any] = dict(sampling=sampling, ends=ends, seed=seed, on_token=on_token)
    return decode(structure, parameters, logits, state, position, count=1, max_new_tokens=max_new_tokens, **options)[0]
