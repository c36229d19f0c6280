"""Toy arithmetic: sums of numbers whose answers can be checked digit by digit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_boolean, check_integer
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks

BASE, PLUS = 10, 10  # symbols 0 to 9 are the digits, symbol 10 is the plus


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """Rows of sums `a + b + ... <ask> sum1 <ask> sum2 ...`: the running sums, one per further term, as many sums as fit in a row.

    The steps are written out, so that every one of them is a sum of two numbers that stand in the row. Numbers have their most
    significant digit first, or last if `reverse`, which makes carries go from left to right. The distance of an answer is that
    to the first digit of the sum's first term.

    Args:
      min_digits, max_digits: digits of a term, drawn uniformly; the first is not 0.
      terms: numbers that are added.
      reverse: whether numbers are written from their last digit.
    """

    min_digits: int = 1
    max_digits: int = 3
    terms: int = 3
    reverse: bool = False

    number: ClassVar[int] = 9

    def __post_init__(self):
        check_range("addition", "digits", self.min_digits, self.max_digits)
        check_integer("addition: max_digits", self.max_digits, maximum=17)  # sums are 64-bit integers
        check_integer("addition: terms", self.terms, minimum=2, maximum=10)
        check_boolean("addition: reverse", self.reverse)
        self.material.check_symbols("addition", BASE + 1)
        if self.length < self._longest:
            raise ValueError(f"addition needs rows of {self._longest} tokens (seq_len) for its longest sum, got {self.length}")

    @property
    def _longest(self) -> int:
        """Tokens of the longest sum with its answers: up to ten terms have a sum of at most one digit more than a term."""
        return self.terms * (self.max_digits + 1) - 1 + (self.terms - 1) * (self.max_digits + 2)

    def _digits(self, number: int) -> list[int]:
        digits = [int(c) for c in str(number)]
        return digits[::-1] if self.reverse else digits

    def example(self, index: int) -> Row:
        rng, blocks, left, first = self.generator(index), [], self.length, self.material.symbols[0]
        while left >= self._longest:
            sizes = rng.integers(self.min_digits, self.max_digits + 1, self.terms)
            terms = [int(rng.integers(BASE ** (size - 1), BASE**size)) for size in sizes.tolist()]
            ids, answers = [], []
            for n, term in enumerate(terms):
                ids += [first + PLUS] * (n > 0) + [first + d for d in self._digits(term)]
            for n in range(2, self.terms + 1):
                ids.append(self.material.ask_id)
                answers += range(len(ids), len(ids) + len(str(sum(terms[:n]))))
                ids += [first + d for d in self._digits(sum(terms[:n]))]
            weights, distances = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
            weights[answers], distances[answers] = self.weight, answers
            blocks.append(Block(np.array(ids), weights, distances))
            left -= len(ids)
        return join_blocks(blocks, self.length)
