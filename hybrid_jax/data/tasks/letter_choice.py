"""Multiple choice over facts of the row: the answer is the letter of the option that a fact says."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_integer
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks


@dataclasses.dataclass(frozen=True)
class LetterChoice(Task):
    """Rows of `<pairs> k1 v1 ... kn vn`, then questions `<ask> key A v B v C v D v <ask> letter`, as many as fit.

    A question asks for a random key; one option is its value, the others are other values. Answering takes the lookup of a fact and
    then of the letter, which is what gather-and-aggregate heads do (arXiv 2504.18574, which measures it on MMLU's letters).
    Letters, keys and values are different symbols. The distance of an answer is that to the fact's value.

    Args:
      min_facts, max_facts: facts per row, drawn uniformly.
      options: options of a question, at most as many as facts.
    """

    min_facts: int = 4
    max_facts: int = 16
    options: int = 4

    number: ClassVar[int] = 8

    def __post_init__(self):
        check_integer("letter choice: options", self.options, minimum=2)
        check_range("letter choice", "facts", self.min_facts, self.max_facts, least=self.options)
        self.material.check_symbols("letter choice", self.options + 2 * self.max_facts)
        needed = 1 + 2 * self.max_facts + self._question
        if self.length < needed:
            raise ValueError(f"letter choice of {self.max_facts} facts needs rows of {needed} tokens (seq_len), got {self.length}")

    @property
    def _question(self) -> int:
        """Tokens of a question with its answer."""
        return 2 * self.options + 4

    @property
    def chance(self) -> float:
        return 1 / self.options

    def example(self, index: int) -> Row:
        rng, (low, high) = self.generator(index), self.material.symbols
        n, middle = int(rng.integers(self.min_facts, self.max_facts + 1)), (low + self.options + high) // 2
        letters = np.arange(low, low + self.options)
        keys = low + self.options + rng.choice(middle - low - self.options, n, replace=False)
        values = middle + rng.choice(high - middle, n, replace=False)
        facts = np.stack([keys, values], axis=1).reshape(-1)
        ids, answers = [self.material.pairs_id, *facts.tolist()], {}
        while len(ids) + self._question <= self.length:
            fact = int(rng.integers(n))
            others = rng.choice(np.delete(np.arange(n), fact), self.options - 1, replace=False)
            shown = rng.permutation([fact, *others])
            ids += [self.material.ask_id, int(keys[fact])]
            ids += np.stack([letters, values[shown]], axis=1).reshape(-1).tolist()
            ids += [self.material.ask_id, int(letters[np.flatnonzero(shown == fact)[0]])]
            answers[len(ids) - 1] = len(ids) - 1 - (2 + 2 * fact)
        weights, distances = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
        weights[list(answers)], distances[list(answers)] = self.weight, list(answers.values())
        return join_blocks([Block(np.array(ids), weights, distances)], self.length)
