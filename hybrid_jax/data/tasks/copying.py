"""Selective copying: tokens scattered among blanks must be written down in their order."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_boolean, check_integer
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, join_blocks


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(Task):
    """Rows of blanks with `tokens` symbols at random places, then `<ask>` and the symbols in their order (arXiv 2312.00752).

    The blank is the marker of pairs. Mamba's form has 4,096 tokens of which 16 are copied, and one marker per answer in place of
    the answers themselves; here the answers stand in the row and are predicted one after the other.

    Args:
      tokens: how many are copied.
      alphabet: of how many symbols they are.
      selective: whether they stand at random places; otherwise they are the row's first tokens.
    """

    tokens: int = 16
    alphabet: int = 16
    selective: bool = True

    number: ClassVar[int] = 5

    def __post_init__(self):
        check_integer("selective copying: tokens", self.tokens, minimum=1)
        check_integer("selective copying: alphabet", self.alphabet, minimum=2)
        check_boolean("selective copying: selective", self.selective)
        self.material.check_symbols("selective copying", self.alphabet)
        if self.length < 2 * self.tokens + 1:
            raise ValueError(
                f"selective copying of {self.tokens} tokens needs rows of {2 * self.tokens + 1} tokens (seq_len), got {self.length}"
            )

    def example(self, index: int) -> Row:
        rng, room = self.generator(index), self.length - self.tokens - 1
        copied = self.material.symbols[0] + rng.integers(0, self.alphabet, self.tokens)
        places = np.sort(rng.choice(room, self.tokens, replace=False)) if self.selective else np.arange(self.tokens)
        ids = np.full(self.length, self.material.pairs_id)
        ids[places], ids[room], ids[room + 1 :] = copied, self.material.ask_id, copied
        weights, distances = np.zeros(self.length, np.float32), np.zeros(self.length, np.int32)
        weights[room + 1 :], distances[room + 1 :] = self.weight, room + 1 + np.arange(self.tokens) - places
        return join_blocks([Block(ids, weights, distances)], self.length)
