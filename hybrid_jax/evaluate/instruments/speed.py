"""Speed on this machine: tokens per second of reading a prompt and of generating."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.checks import check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject, check_counts
from hybrid_jax.evaluate.measurement import Measurement, weighted_mean
from hybrid_jax.parameters import Parameters, join_model, split_model


@dataclasses.dataclass(frozen=True)
class Speed(Instrument):
    """Measures `prefill` and `decode`, in tokens per second of all sequences together, at {"tokens": n}.

    Prefill reads n tokens of every sequence at once; decode then generates one token after the other behind them. Both are
    timed after a first call that compiles. Speeds belong to the machine and to what else runs on it: compare models only within
    one evaluation.

    Args:
      lengths: tokens of the prompts.
      batch_size: sequences at a time.
      new_tokens: tokens that are generated in one timed run.
      repeats: timed runs; the interval is over them.
    """

    headline: ClassVar[tuple[str, ...]] = ("prefill tokens", "decode tokens")

    lengths: tuple[int, ...] = (512,)
    batch_size: int = 1
    new_tokens: int = 16
    repeats: int = 5

    def __post_init__(self):
        check_counts(self, "batch_size", "new_tokens", "repeats")
        if not self.lengths:
            raise ValueError("speed: lengths must hold at least one number of tokens")
        for length in self.lengths:
            check_integer("lengths", length, minimum=1)

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        if mesh is not None:
            raise ValueError(
                "speed: it is measured on one device; evaluate speed without a mesh (`configs/evaluate.py:mesh` leaves it out)"
            )
        longest = max(self.lengths) + self.new_tokens
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"speed: {max(self.lengths):,} + {self.new_tokens} tokens are more than the model's max_position_embeddings, "
                f"{config.max_position_embeddings:,}"
            )

    def stamp(self) -> Any:
        """Returns the devices and the versions that speeds belong to."""
        return [jax.devices()[0].device_kind, jax.device_count(), os.cpu_count(), jax.__version__]

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        structure, parameters = split_model(subject.model)
        found = []
        for n, length in enumerate(self.lengths, start=1):
            prefill, decode = self._programs(structure, length)
            ids = jnp.ones((self.batch_size, length), jnp.int32)
            read = prefill(parameters, ids)
            for name, tokens, seconds in (
                ("prefill", length, _seconds(lambda prefill=prefill, ids=ids: prefill(parameters, ids), self.repeats)),
                ("decode", self.new_tokens, _seconds(lambda d=decode, r=read: d(parameters, *r), self.repeats)),
            ):
                speeds = self.batch_size * tokens / np.array(seconds)
                found.append(weighted_mean(name, speeds, np.ones(self.repeats), "tokens/s", tokens=length))
            progress(n, len(self.lengths))
        return [dataclasses.replace(m, sums=()) for m in found if m is not None]

    def _programs(self, structure: Any, length: int) -> tuple[Callable, Callable]:
        """Returns the jitted (prefill: parameters, ids -> (token, state)) and (decode: parameters, token, state -> token)."""

        def step(parameters: Parameters, ids: jax.Array, state: Any, begin: int | jax.Array) -> tuple[jax.Array, Any]:
            model = join_model(structure, parameters)
            positions = jnp.broadcast_to(begin + jnp.arange(ids.shape[1]), ids.shape)
            hidden, state = model.hidden_states(ids, jnp.ones_like(ids), positions, state)
            return jnp.argmax(model.head(hidden[:, -1:]), axis=-1).astype(jnp.int32), state

        @jax.jit
        def prefill(parameters: Parameters, ids: jax.Array) -> tuple[jax.Array, Any]:
            state = join_model(structure, parameters).init_state(self.batch_size, length + self.new_tokens)
            return step(parameters, ids, state, 0)

        @jax.jit
        def decode(parameters: Parameters, token: jax.Array, state: Any) -> jax.Array:
            places = length + jnp.arange(self.new_tokens)
            return jax.lax.scan(lambda carry, at: (step(parameters, *carry, at), None), (token, state), places)[0][0]

        return prefill, decode


def _seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Returns the seconds of each of so many runs, after one that is not counted."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - begin)
    return found
