"""Needles: key-value pairs at random places of a text, asked anywhere after them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_choice, check_number
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks
from hybrid_jax.data.tasks.retrieval import check_pairs, keys_beside_text


@dataclasses.dataclass(frozen=True)
class Needles(Task):
    """Rows of text with `<pairs> key value` at random places, and `<ask> key value` once for each pair at a later one.

    Every row is one segment. The text's tokens have weight 1, unless `text_weight` says otherwise.

    Args:
      min_needles, max_needles: pairs per row, drawn uniformly.
      key_tokens, value_tokens: symbols of a key and of a value.
      ask: `anywhere`: a question stands at a random place after its pair; `end`: all stand at the row's end, in random order.
      depth: where the pairs stand, from 0 (the row's beginning) to 1 (right before the questions); negative: at random. Only
        with `ask = "end"`.
      text_weight: of a token of the text in the loss.
    """

    min_needles: int = 1
    max_needles: int = 8
    key_tokens: int = 1
    value_tokens: int = 2
    ask: str = "anywhere"
    depth: float = -1.0
    text_weight: float = 1.0

    number: ClassVar[int] = 3
    reads_text: ClassVar[bool] = True

    def __post_init__(self):
        check_range("needles", "needles", self.min_needles, self.max_needles)
        check_choice("needles: ask", self.ask, ("anywhere", "end"))
        check_number("needles: depth", self.depth, maximum=1)
        check_number("needles: text_weight", self.text_weight, minimum=0)
        if self.depth >= 0 and self.ask != "end":
            raise ValueError(f"needles: depth needs ask = 'end'; got {self.depth} with ask = {self.ask!r}")
        if self.material.text is None:
            raise ValueError("needles stand in text, and there is none: give the task a source of text")
        check_pairs("needles", self.material, self.max_needles, self.key_tokens, self.value_tokens)
        needed = 2 * self.max_needles * (1 + self.key_tokens + self.value_tokens) + 1
        if self.length < needed:
            raise ValueError(f"{self.max_needles} needles need rows of {needed} tokens (seq_len) or more, got {self.length}")

    def example(self, index: int) -> Row:
        assert self.material.text is not None
        rng, text = self.generator(index), self.material.text(self.length)
        filler = text[int(rng.integers(len(text)))]
        n = int(rng.integers(self.min_needles, self.max_needles + 1))
        keys = keys_beside_text(rng, self.material, n, self.key_tokens, filler["input_ids"])
        values = rng.integers(*self.material.symbols, (n, self.value_tokens))
        size = 1 + self.key_tokens + self.value_tokens
        room = self.length - 2 * n * size  # tokens of text
        if self.ask == "end":
            told = np.full(n, round(self.depth * room)) if self.depth >= 0 else rng.integers(0, room + 1, n)
            asked = np.full(n, room)
        else:
            told, asked = np.sort(rng.integers(0, room + 1, (n, 2)), axis=1).T
        # what is inserted where, in order: at equal places pairs stand before questions, each in random order
        inserted = sorted(
            [(int(told[i]), 0, rng.random(), i) for i in range(n)] + [(int(asked[i]), 1, rng.random(), i) for i in range(n)]
        )
        ids, weights, distances = (np.zeros(self.length, dtype) for dtype in (np.int32, np.float32, np.int32))
        at = taken = 0
        place: dict[int, int] = {}

        def fill(until: int) -> None:
            nonlocal at, taken
            ids[at : at + until - taken] = filler["input_ids"][taken:until]
            weights[at : at + until - taken] = self.text_weight * filler["loss_weights"][taken:until]
            at, taken = at + until - taken, until

        for where, question, _, i in inserted:
            fill(where)
            ids[at] = self.material.ask_id if question else self.material.pairs_id
            ids[at + 1 : at + size] = np.concatenate([keys[i], values[i]])
            if question:
                weights[at + 1 + self.key_tokens : at + size] = self.weight
                distances[at + 1 + self.key_tokens : at + size] = at - place[i]
            else:
                place[i] = at
            at += size
        fill(room)
        weights[0] = 0
        return join_blocks([Block(ids, weights, distances)], self.length)
