"""What a model costs: parameters, and the bytes of state and cache that a sequence holds while it is decoded."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from hybrid_jax.checks import check_choice, check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject
from hybrid_jax.evaluate.measurement import Measurement, exact
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parameters import count, split_model


def state_bytes(config: ModelConfig, length: int, dtype: str = "bfloat16") -> int:
    """Returns the bytes of one sequence's keys, values and states in all layers, with room for `length` tokens.

    Args:
      dtype: of keys and values; recurrent states have the dtype that their layer gives them.
    """
    model = abstract_decoder(config, compute_dtype=jnp.dtype(dtype))
    state = jax.eval_shape(lambda: model.init_state(1, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


@dataclasses.dataclass(frozen=True)
class Cost(Instrument):
    """Measures `parameters`, and `state_bytes` at {"tokens": n}, the bytes that a sequence of n tokens holds.

    Args:
      lengths: numbers of tokens.
      dtype: of keys and values, as `state_bytes` takes it.
    """

    headline: ClassVar[tuple[str, ...]] = ("parameters", "state_bytes tokens")

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    dtype: str = "bfloat16"

    def __post_init__(self):
        if not self.lengths:
            raise ValueError("cost: lengths must hold at least one number of tokens")
        for length in self.lengths:
            check_integer("lengths", length, minimum=1)
        check_choice("dtype", self.dtype, ("bfloat16", "float16", "float32"))

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        found = [exact("parameters", count(split_model(subject.model)[1]))]
        for n, length in enumerate(self.lengths, start=1):
            found.append(exact("state_bytes", state_bytes(subject.model.config, length, self.dtype), "bytes", tokens=length))
            progress(n, len(self.lengths))
        return found
