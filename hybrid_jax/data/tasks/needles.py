"""Needles: key-value pairs at random places of a text, asked anywhere after them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_choice, check_integer, check_number
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks
from hybrid_jax.data.tasks.retrieval import check_pairs, keys_beside_text


@dataclasses.dataclass(frozen=True)
class Needles(Task):
    """Rows of text with `<pairs> key value` at random places, and `<ask> key value` once for each key at a later one.

    Every row is one segment. The text's tokens have weight 1, unless `text_weight` says otherwise. RULER's variants
    (arXiv 2404.06654): single is one needle; multi-key is several needles of which one is asked; multi-value is one needle with
    several values; multi-query is several needles that are all asked.

    Args:
      min_needles, max_needles: keys per row, drawn uniformly.
      key_tokens, value_tokens: symbols of a key and of a value.
      values: values of a key. Each stands with its key at a place of its own; the question is followed by all of them, in the
        order in which they were told.
      asked: keys that are asked, at most `min_needles`; the others only distract. 0: all.
      ask: `anywhere`: a question stands at a random place after its pair; `end`: all stand at the row's end, in random order.
      depth: where the pairs stand, from 0 (the row's beginning) to 1 (right before the questions); negative: at random. Only
        with `ask = "end"`.
      text_weight: of a token of the text in the loss.
    """

    min_needles: int = 1
    max_needles: int = 8
    key_tokens: int = 1
    value_tokens: int = 2
    values: int = 1
    asked: int = 0
    ask: str = "anywhere"
    depth: float = -1.0
    text_weight: float = 1.0

    number: ClassVar[int] = 3
    reads_text: ClassVar[bool] = True

    def __post_init__(self):
        check_range("needles", "needles", self.min_needles, self.max_needles)
        check_integer("needles: values", self.values, minimum=1)
        check_integer("needles: asked", self.asked, minimum=0, maximum=self.min_needles)
        check_choice("needles: ask", self.ask, ("anywhere", "end"))
        check_number("needles: depth", self.depth, maximum=1)
        check_number("needles: text_weight", self.text_weight, minimum=0)
        if self.depth >= 0 and self.ask != "end":
            raise ValueError(f"needles: depth needs ask = 'end'; got {self.depth} with ask = {self.ask!r}")
        if self.material.text is None:
            raise ValueError("needles stand in text, and there is none: give the task a source of text")
        check_pairs("needles", self.material, self.max_needles, self.key_tokens, self.value_tokens)
        needed = self._inserted(self.max_needles) + 1
        if self.length < needed:
            raise ValueError(f"{self.max_needles} needles need rows of {needed} tokens (seq_len) or more, got {self.length}")

    @property
    def _told(self) -> int:
        """The tokens of `<pairs> key value`."""
        return 1 + self.key_tokens + self.value_tokens

    def _inserted(self, needles: int) -> int:
        """Returns how many tokens of a row are not text."""
        question = 1 + self.key_tokens + self.values * self.value_tokens
        return needles * self.values * self._told + (self.asked or needles) * question

    @property
    def chance(self) -> float:
        return 1 / (self.material.symbols[1] - self.material.symbols[0])

    def example(self, index: int) -> Row:
        assert self.material.text is not None
        rng, text = self.generator(index), self.material.text(self.length)
        filler = text[int(rng.integers(len(text)))]
        n = int(rng.integers(self.min_needles, self.max_needles + 1))
        keys = keys_beside_text(rng, self.material, n, self.key_tokens, filler["input_ids"])
        values = rng.integers(*self.material.symbols, (n, self.values, self.value_tokens))
        room = self.length - self._inserted(n)  # tokens of text
        if self.ask == "end":
            places = (n, self.values)
            told = np.full(places, round(self.depth * room)) if self.depth >= 0 else rng.integers(0, room + 1, places)
            asked = np.full(n, room)
        else:
            both = np.sort(rng.integers(0, room + 1, (n, self.values + 1)), axis=1)
            told, asked = both[:, :-1], both[:, -1]
        # what is inserted where, in order: at equal places pairs stand before questions, each in random order
        pairs = [(int(where), 0, rng.random(), i) for i in range(n) for where in told[i]]
        inserted = sorted(pairs + [(int(asked[i]), 1, rng.random(), i) for i in range(self.asked or n)])
        ids, weights, distances = (np.zeros(self.length, dtype) for dtype in (np.int32, np.float32, np.int32))
        at = taken = 0
        places_of: list[list[int]] = [[] for _ in range(n)]  # of each key, where its values were told

        def fill(until: int) -> None:
            nonlocal at, taken
            ids[at : at + until - taken] = filler["input_ids"][taken:until]
            weights[at : at + until - taken] = self.text_weight * filler["loss_weights"][taken:until]
            at, taken = at + until - taken, until

        for where, question, _, i in inserted:
            fill(where)
            ids[at] = self.material.ask_id if question else self.material.pairs_id
            at += 1
            ids[at : at + self.key_tokens] = keys[i]
            at += self.key_tokens
            for value in range(self.values) if question else (len(places_of[i]),):
                if question:
                    weights[at : at + self.value_tokens] = self.weight
                    distances[at : at + self.value_tokens] = at - places_of[i][value]
                else:
                    places_of[i].append(at)
                ids[at : at + self.value_tokens] = values[i, value]
                at += self.value_tokens
        fill(room)
        weights[0] = 0
        return join_blocks([Block(ids, weights, distances)], self.length)
