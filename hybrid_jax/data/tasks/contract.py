"""The contract of a synthetic task: rows of token ids with answers that the earlier tokens of the row determine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_integer
from hybrid_jax.data.packing import Row, Rows


@dataclasses.dataclass(frozen=True)
class Material:
    """What tasks make their rows of.

    Args:
      symbols: tasks draw random tokens from the ids symbols[0] ... symbols[1] - 1.
      pairs_id, ask_id: the markers that begin what must be remembered, and what is asked.
      text: makes rows of text of a given length, for tasks with filler; None: such tasks are refused.
    """

    symbols: tuple[int, int]
    pairs_id: int
    ask_id: int
    text: Callable[[int], Rows] | None = None

    def check_symbols(self, task: str, needed: int) -> None:
        """Checks that there are `needed` symbols.

        Raises:
          ValueError: there are fewer.
        """
        if (have := self.symbols[1] - self.symbols[0]) < needed:
            raise ValueError(
                f"{task} draws from {needed} or more token ids that are consecutive and ordinary text, the tokenizer has "
                f"{have}; leave the task out of the mix, or take a larger tokenizer"
            )


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a row that is a segment of its own; each array is [tokens of the block].

    Args:
      ids: int32 token ids.
      weights: float32 weight of predicting each token from those before it; an answer has a positive weight.
      distances: int32; of an answer, how many tokens back the token is that determines it; 0 elsewhere.
    """

    ids: np.ndarray
    weights: np.ndarray
    distances: np.ndarray


def join_blocks(blocks: Sequence[Block], length: int) -> Row:
    """Returns the row of `length` tokens whose segments are the blocks, padded; with `distances` [length] beside a row's arrays."""
    row = {
        "input_ids": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "distances": np.zeros(length, np.int32),
    }
    at = 0
    for n, block in enumerate(blocks, start=1):
        end = at + len(block.ids)
        row["input_ids"][at:end], row["segment_ids"][at:end] = block.ids, n
        row["loss_weights"][at:end], row["distances"][at:end] = block.weights, block.distances
        at = end
    return row


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows of a synthetic task. Row i is a function of (options, seed, i) and, where the task has filler, of the text.

    A subclass is a dataclass whose further fields are the task's options, all with defaults, and which defines `example`.

    Args:
      material: see `Material`.
      length: tokens per row.
      seed: with the row's number, decides the row.
      weight: of an answer in the loss; a token of text has weight 1.
      rows: number of rows.

    Raises:
      ValueError: an option is out of range, a row of `length` has no room for one example, or there are too few symbols.
    """

    material: Material
    length: int
    seed: int = 0
    weight: float = 1.0
    rows: int = 1 << 20

    number: ClassVar[int]
    """Keeps the random numbers of tasks with one seed apart; different for each task."""
    reads_text: ClassVar[bool] = False
    """Whether its rows depend on `material.text`."""

    def __len__(self) -> int:
        return self.rows

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing among all possible answers; None: there is no such number."""
        return None

    @property
    def unused(self) -> str:
        """Is empty, as synthetic rows leave no token out."""
        return ""

    def generator(self, index: int) -> np.random.Generator:
        """Returns the random numbers of row `index`."""
        return np.random.default_rng([self.seed, self.number, int(index)])

    def example(self, index: int) -> Row:
        """Returns row `index` with one array more, `distances`; see `Block`."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        """Returns row `index` as training reads it."""
        row = self.example(index)
        return {name: row[name] for name in ("input_ids", "segment_ids", "loss_weights")}


def check_range(task: str, name: str, low: int, high: int, least: int = 1) -> None:
    """Checks a range of an option.

    Raises:
      ValueError: it is empty, or begins below `least`; or a bound is not an integer.
    """
    for bound, value in (("min", low), ("max", high)):
        check_integer(f"{task}: {bound}_{name}", value)
    if not least <= low <= high:
        raise ValueError(f"{task}: min_{name} and max_{name} must satisfy {least} <= min <= max, got {low} and {high}")
