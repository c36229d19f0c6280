"""How the next token is chosen from logits: greedily, or at random after temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.checks import check_integer, check_number

COLDEST = 1e-6  # temperatures below it are greedy; float32 cannot divide by them


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
      temperature: logits are divided by it; 0 is greedy.
      top_p: of the tokens in order of probability, those are kept whose predecessors' probabilities sum to less than this; 1
        keeps all.
      top_k: how many of the most likely tokens are kept; 0 keeps all.

    Raises:
      ValueError: a negative temperature or top_k, or top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, minimum=0)
        check_number("top_p", self.top_p, above=0, maximum=1)
        check_integer("top_k", self.top_k, minimum=0)

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


def adjusted(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the float32 logits [B, vocab] to draw from: after temperature, then top-k, then top-p, as in transformers.

    A token that is not kept has -inf.
    """
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        lowest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return logits


def row_keys(seed: int, numbers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns the numbers of a key for each row, [rows, 2] uint32, from the seed (below 2^32) and two numbers of the row alone."""
    return np.asarray(_row_keys(np.uint32(seed), np.asarray(numbers, np.uint32)))


@jax.jit
def _row_keys(seed: Any, numbers: jax.Array) -> jax.Array:
    def key(row: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row[0]), row[1]))

    return jax.vmap(key)(numbers)


@jax.jit
def keys_of_step(row_keys: Any, step: Any) -> jax.Array:
    """Returns the keys with which rows draw their token of a step, [rows, 2], from the rows' own keys."""
    return jax.vmap(lambda key: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), step)))(row_keys)


@functools.partial(jax.jit, static_argnames="sampling")
def sample(logits: jax.Array, key_data: Any, sampling: Sampling) -> jax.Array:
    """Returns one token id for each row of logits [B, vocab], as an array [B], drawn by the key of `key_data`.

    `key_data` [2] is one key for all rows; [B, 2] has a key for each, with which a row's token does not depend on its neighbours.
    It comes as numbers, in numpy, which are the same on the hosts of a mesh and belong to no device.
    """
    if sampling.greedy:
        return jnp.argmax(logits.astype(jnp.float32), axis=-1)
    keys, logits = jax.random.wrap_key_data(key_data), adjusted(logits, sampling)
    return jax.random.categorical(keys, logits) if keys.ndim == 0 else jax.vmap(jax.random.categorical)(keys, logits)
