"""What a model costs: parameters, and the bytes of state and cache that a sequence holds while it is decoded."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hybrid_jax.checks import check_choice, check_integer
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject
from hybrid_jax.evaluate.measurement import Measurement, exact
from hybrid_jax.memory import state_bytes_by_kind
from hybrid_jax.parameters import count, split_model


@dataclasses.dataclass(frozen=True)
class Cost(Instrument):
    """Measures `parameters`, and `state_bytes` at {"tokens": n}, the bytes that a sequence of n tokens holds; of a model with more
    than one kind of mixer also `bytes by mixer` at {"mixer": symbol, "tokens": n}, see `memory.state_bytes_by_kind`.

    Args:
      lengths: numbers of tokens.
      dtype: of keys and values, as `memory.state_bytes` takes it.
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
            by_kind = state_bytes_by_kind(subject.model.config, length, dtype=self.dtype)
            found.append(exact("state_bytes", sum(by_kind.values()), "bytes", tokens=length))
            if len(by_kind) > 1:
                found += [exact("bytes by mixer", n, "bytes", mixer=kind, tokens=length) for kind, n in by_kind.items()]
            progress(n, len(self.lengths))
        return found
