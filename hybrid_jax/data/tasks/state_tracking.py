"""State tracking: parity of bits and modular arithmetic, whose answers depend on every token before them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_boolean, check_integer
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks


@dataclasses.dataclass(frozen=True)
class StateTracking(Task):
    """Base of tasks whose rows hold as many expressions as fit, each `e1 ... en <ask> answer` and a segment of its own.

    The evidence of an answer is the complete expression; its distance is that to the expression's first token.

    Args:
      min_length, max_length: tokens of an expression, drawn uniformly. The published setting trains on 3 to 40 and tests on 40 to
        256 (arXiv 2411.12537).
    """

    min_length: int = 3
    max_length: int = 40

    def check_length(self, task: str, least: int) -> None:
        """Checks the range of lengths, and that a row holds an expression.

        Raises:
          ValueError: it does not.
        """
        check_range(task, "length", self.min_length, self.max_length, least=least)
        if self.length < self.max_length + 2:
            raise ValueError(
                f"{task} of up to {self.max_length} tokens needs rows of {self.max_length + 2} tokens (seq_len), got {self.length}"
            )

    def expression(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        """Returns the symbols of a random expression, at most `length` of them, and its answer, numbered from 0."""
        raise NotImplementedError

    def example(self, index: int) -> Row:
        rng, blocks, left = self.generator(index), [], self.length
        while left >= self.max_length + 2:
            symbols, answer = self.expression(rng, int(rng.integers(self.min_length, self.max_length + 1)))
            first, n = self.material.symbols[0], len(symbols)
            ids = np.array([*(first + s for s in symbols), self.material.ask_id, first + answer])
            weights, distances = np.zeros(n + 2, np.float32), np.zeros(n + 2, np.int32)
            weights[-1], distances[-1] = self.weight, n + 1
            blocks.append(Block(ids, weights, distances))
            left -= n + 2
        return join_blocks(blocks, self.length)


@dataclasses.dataclass(frozen=True)
class Parity(StateTracking):
    """Random bits; the answer is their sum modulo 2."""

    number: ClassVar[int] = 6

    def __post_init__(self):
        self.check_length("parity", 1)
        self.material.check_symbols("parity", 2)

    @property
    def chance(self) -> float:
        return 0.5

    def expression(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        bits = rng.integers(0, 2, length).tolist()
        return bits, sum(bits) % 2


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(StateTracking):
    """Numbers and operators; the answer is the value modulo `modulus` (arXiv 2207.02098, 2411.12537).

    Symbols 0 to modulus - 1 are the numbers, the next ones are + - * and, with brackets, ( and ). Without brackets, numbers and
    operators alternate and * goes first; an even length is one shorter. With brackets, expressions are those of the published
    generator: fully parenthesized sums and differences of terms, where a term of fewer than 5 tokens is n, -n, (n) or (-n).

    Args:
      min_length, max_length: see `StateTracking`.
      modulus: of the numbers.
      brackets: which of the two forms.
    """

    modulus: int = 5
    brackets: bool = False

    number: ClassVar[int] = 7

    def __post_init__(self):
        check_integer("modular arithmetic: modulus", self.modulus, minimum=2)
        check_boolean("modular arithmetic: brackets", self.brackets)
        self.check_length("modular arithmetic", 3)
        self.material.check_symbols("modular arithmetic", self.modulus + 5)

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def expression(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        return self._bracketed(rng, length) if self.brackets else self._flat(rng, length)

    def _flat(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        count = (length + 1) // 2
        numbers, operators = rng.integers(0, self.modulus, count).tolist(), rng.integers(0, 3, count - 1).tolist()
        terms, signs = [numbers[0]], [1]
        for operator, number in zip(operators, numbers[1:], strict=True):
            if operator == 2:
                terms[-1] *= number
            else:
                terms.append(number)
                signs.append(-1 if operator else 1)
        symbols = [numbers[0]]
        for operator, number in zip(operators, numbers[1:], strict=True):
            symbols += [self.modulus + operator, number]
        return symbols, sum(s * t for s, t in zip(signs, terms, strict=True)) % self.modulus

    def _bracketed(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        plus, minus, begin, end = self.modulus, self.modulus + 1, self.modulus + 3, self.modulus + 4
        if length < 5:
            n = int(rng.integers(self.modulus))
            forms = ([n], n), ([minus, n], -n), ([begin, n, end], n), ([begin, minus, n, end], -n)
            symbols, value = forms[max(length, 1) - 1]
            return symbols, value % self.modulus
        left = int(rng.integers(1, length - 3))
        first, one = self._bracketed(rng, left)
        second, other = self._bracketed(rng, length - left - 3)
        negative = bool(rng.integers(2))
        value = one - other if negative else one + other
        return [begin, *first, minus if negative else plus, *second, end], value % self.modulus
