"""Generation with the hybrid cache: keys and values for attention, states for recurrent layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.model import Decoder
from hybrid_jax.parameters import join_model, split_model

__all__ = ["generate"]


def _sample(logits, key, temperature: float, top_p: float):
    """One token id a row from logits [B, vocab]; temperature 0 is greedy."""
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return jax.random.categorical(key, logits)


@functools.partial(jax.jit, static_argnums=0)
def _forward(structure, parameters, ids, segment_ids, positions, state):
    model = join_model(structure, parameters)
    hidden, state = model.hidden_states(ids, segment_ids, positions, state)
    return model.head(hidden[:, -1]), state


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seed: int = 0,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Continues token sequences, all rows at once.

    Rows of different lengths are padded on the left; padding is a segment of its own, which neither
    attention nor a recurrent state sees, so a row's continuation does not depend on its neighbours.

    Args:
      prompts: token ids, at least one a row.
      max_new_tokens: at most so many new ids a row.
      temperature: 0 is greedy.
      top_p: nucleus sampling, 1 is off.
      eos_id: ends a row; it is not returned.
      seed: of sampling.
      on_token: called with every step's ids [B].

    Returns:
      The new ids of each row.

    Raises:
      ValueError: an empty prompt, or an id outside the vocabulary.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    if max(max(p) for p in prompts) >= model.config.vocab_size or min(min(p) for p in prompts) < 0:
        raise ValueError(f"a prompt has a token id outside 0 ... {model.config.vocab_size - 1}; is it this model's tokenizer?")
    B, longest = len(prompts), max(map(len, prompts))
    ids = np.zeros((B, longest), np.int32)
    segments = np.zeros((B, longest), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        segments[row, longest - len(prompt) :] = 1
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)

    structure, parameters = split_model(model)
    state = model.init_state(B, longest + max_new_tokens)
    logits, state = _forward(structure, parameters, ids, segments, positions, state)
    key, position = jax.random.key(seed), positions[:, -1:]
    rows: list[list[int]] = [[] for _ in range(B)]
    alive = np.ones(B, bool)
    ones = np.ones((B, 1), np.int32)
    for step in range(max_new_tokens):
        key, now = jax.random.split(key)
        token = np.asarray(_sample(logits, now, temperature, top_p), np.int32)
        if eos_id is not None:
            alive &= token != eos_id
        if not alive.any():
            break
        if on_token is not None:
            on_token(token)
        for row in np.flatnonzero(alive):
            rows[row].append(int(token[row]))
        if step + 1 < max_new_tokens:
            position = position + 1
            logits, state = _forward(structure, parameters, token[:, None], ones, position, state)
    return rows
