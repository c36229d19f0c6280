"""Induction: a random sequence is repeated once."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """Blocks of random tokens that are repeated once, so that all but the first of the second time can be predicted.

    A row holds blocks until the longest period does not fit any more.

    Args:
      min_period, max_period: how many tokens are repeated, drawn uniformly.
    """

    min_period: int = 4
    max_period: int = 48

    number: ClassVar[int] = 2

    def __post_init__(self):
        check_range("induction", "period", self.min_period, self.max_period, least=2)
        if self.length < 2 * self.max_period:
            raise ValueError(
                f"induction with periods up to {self.max_period} needs rows of {2 * self.max_period} tokens (seq_len) or more, "
                f"got {self.length}: shorter rows would hold nothing to learn"
            )
        self.material.check_symbols("induction", 2)

    def example(self, index: int) -> Row:
        rng = self.generator(index)
        blocks, left = [], self.length
        while left >= 2 * self.max_period:
            period = int(rng.integers(self.min_period, self.max_period + 1))
            once = rng.integers(*self.material.symbols, period)
            weights, distances = np.zeros(2 * period, np.float32), np.zeros(2 * period, np.int32)
            weights[period + 1 :] = self.weight
            distances[period + 1 :] = period
            blocks.append(Block(np.concatenate([once, once]), weights, distances))
            left -= 2 * period
        return join_blocks(blocks, self.length)
