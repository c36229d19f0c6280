"""Multi-query associative recall: pairs, then their keys again at distances that follow a power law."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_boolean, check_number
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Rows of `k1 v1 ... kn vn`, then filler in which every key stands once more, followed by its value (arXiv 2312.04927).

    Keys are distinct and of the first half of the symbols, values of the second. Every key is asked in one of the
    (length - 2n) / 2 slots of two tokens after the pairs. Slot s is chosen with a probability proportional to
    power * s^(power - 1), so that most gaps are short and some are long. The paper's vocabulary has 8,192 tokens, so that random
    filler hardly ever holds a key of the row. Here there are as many as the tasks have symbols, and filler is drawn from those
    that are no key of the row, because a key with another token behind it would overwrite its value. There the value is a label
    only; here it stands in the row, which leaves the task as it is, because a key is asked once.

    Args:
      min_pairs, max_pairs: pairs per row, drawn uniformly.
      power: of the gaps, in (0, 1].
      random_filler: whether filler is random symbols or the marker of pairs.
    """

    min_pairs: int = 8
    max_pairs: int = 8
    power: float = 0.01
    random_filler: bool = True

    number: ClassVar[int] = 4

    def __post_init__(self):
        check_range("mqar", "pairs", self.min_pairs, self.max_pairs)
        check_number("mqar: power", self.power, above=0, maximum=1)
        check_boolean("mqar: random_filler", self.random_filler)
        self.material.check_symbols("mqar", 2 * self.max_pairs)
        if self.length < 4 * self.max_pairs:
            needed = 4 * self.max_pairs
            raise ValueError(f"mqar of {self.max_pairs} pairs needs rows of {needed} tokens (seq_len), got {self.length}")

    @property
    def chance(self) -> float:
        return 1 / (self.material.symbols[1] - sum(self.material.symbols) // 2)

    def example(self, index: int) -> Row:
        rng, (low, high) = self.generator(index), self.material.symbols
        n, middle = int(rng.integers(self.min_pairs, self.max_pairs + 1)), (low + high) // 2
        keys = low + rng.choice(middle - low, n, replace=False)
        values = middle + rng.choice(high - middle, n, replace=False)
        slots = (self.length - 2 * n) // 2
        chances = self.power * np.arange(1, slots + 1) ** (self.power - 1)
        asked = 2 * n + 2 * rng.choice(slots, n, replace=False, p=chances / chances.sum())
        ids = np.full(self.length, self.material.pairs_id)
        if self.random_filler:
            ids = rng.choice(np.setdiff1d(np.arange(low, high), keys), self.length)
        ids[: 2 * n] = np.stack([keys, values], axis=1).reshape(-1)
        ids[asked], ids[asked + 1] = keys, values
        weights, distances = np.zeros(self.length, np.float32), np.zeros(self.length, np.int32)
        weights[asked + 1], distances[asked + 1] = self.weight, asked - 2 * np.arange(n)
        return join_blocks([Block(ids, weights, distances)], self.length)
