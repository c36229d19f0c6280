"""Synthetic recall tasks, every row a pure function of (seed, index).

Rows have the form of `packing.Row`; the blocks of one row are separate segments. Only the answers have a weight in the loss.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hybrid_jax.data.packing import Row

Block = tuple[np.ndarray, np.ndarray]
"""Token ids and loss weights of one block, each [tokens of the block]."""


def _join(blocks: list[Block], length: int) -> Row:
    """Puts blocks one after the other as the segments of a row, and pads it."""
    ids = np.zeros(length, np.int32)
    segments = np.zeros(length, np.int32)
    weights = np.zeros(length, np.float32)
    at = 0
    for n, (block, weight) in enumerate(blocks, start=1):
        end = at + len(block)
        ids[at:end], segments[at:end], weights[at:end] = block, n, weight
        at = end
    return {"input_ids": ids, "segment_ids": segments, "loss_weights": weights}


def _check_symbols(task: str, symbols: tuple[int, int], needed: int) -> None:
    if symbols[1] - symbols[0] < needed:
        raise ValueError(
            f"{task} draws from {needed} or more token ids that are consecutive and ordinary text, the tokenizer has "
            f"{symbols[1] - symbols[0]}; leave the task out of the mix, or take a larger tokenizer"
        )


@dataclasses.dataclass(frozen=True)
class KeyValueRetrieval:
    """Rows of `<pairs> k1 v1 ... kn vn <ask> k5 v5 k2 v2 ...`: every key is asked once, in another order.

    The keys of a block are distinct; values may repeat.

    Args:
      length: tokens per row.
      symbols: (first, last + 1) ids to draw from.
      pairs_id, ask_id: the two markers.
      min_pairs, max_pairs: pairs per block, drawn uniformly.
      seed: with the row's index, decides the row.
      weight: of an answer in the loss.
      rows: number of rows.

    Raises:
      ValueError: rows too short for one block, or too few symbols for distinct keys.
    """

    length: int
    symbols: tuple[int, int]
    pairs_id: int
    ask_id: int
    min_pairs: int = 2
    max_pairs: int = 20
    seed: int = 0
    weight: float = 1.0
    rows: int = 1 << 20

    def __post_init__(self):
        if self.length < 4 * self.max_pairs + 2:
            raise ValueError(
                f"key-value retrieval of {self.max_pairs} pairs needs rows of {4 * self.max_pairs + 2} tokens "
                f"(seq_len) or more, got {self.length}"
            )
        _check_symbols("key-value retrieval", self.symbols, self.max_pairs)

    def __len__(self) -> int:
        return self.rows

    @property
    def unused(self) -> str:
        """Is empty, as synthetic rows leave no token out."""
        return ""

    def block(self, rng: np.random.Generator) -> Block:
        """Draws one block: the pairs, then every key with its value in another order."""
        n = int(rng.integers(self.min_pairs, self.max_pairs + 1))
        keys = rng.choice(np.arange(*self.symbols), n, replace=False)
        values = rng.integers(*self.symbols, n)
        order = rng.permutation(n)
        pairs = np.stack([keys, values], 1).reshape(-1)
        asked = np.stack([keys[order], values[order]], 1).reshape(-1)
        ids = np.concatenate([[self.pairs_id], pairs, [self.ask_id], asked])
        weights = np.zeros(len(ids), np.float32)
        weights[2 * n + 3 :: 2] = self.weight
        return ids, weights

    def __getitem__(self, index: int) -> Row:
        rng = np.random.default_rng([self.seed, 1, int(index)])
        blocks, left = [], self.length
        while True:
            block = self.block(rng)
            if len(block[0]) > left:
                return _join(blocks, self.length) if blocks else self[int(index) + self.rows]
            blocks.append(block)
            left -= len(block[0])


@dataclasses.dataclass(frozen=True)
class Induction:
    """Rows of random tokens that are repeated once, so that all but the first of the second time can be predicted.

    Args:
      length: tokens per row; at least one block of the longest period.
      symbols: (first, last + 1) ids to draw from.
      min_period, max_period: how many tokens are repeated, drawn uniformly.
      seed, weight, rows: as in `KeyValueRetrieval`.

    Raises:
      ValueError: rows too short for one block, or fewer than two symbols.
    """

    length: int
    symbols: tuple[int, int]
    min_period: int = 4
    max_period: int = 48
    seed: int = 0
    weight: float = 1.0
    rows: int = 1 << 20

    def __post_init__(self):
        if self.length < 2 * self.max_period:
            raise ValueError(
                f"induction with periods up to {self.max_period} needs rows of {2 * self.max_period} tokens (seq_len) or more, "
                f"got {self.length}: shorter rows would hold nothing to learn"
            )
        _check_symbols("induction", self.symbols, 2)

    def __len__(self) -> int:
        return self.rows

    @property
    def unused(self) -> str:
        """Is empty, as synthetic rows leave no token out."""
        return ""

    def __getitem__(self, index: int) -> Row:
        rng = np.random.default_rng([self.seed, 2, int(index)])
        blocks, left = [], self.length
        while left >= 2 * self.max_period:
            period = int(rng.integers(self.min_period, self.max_period + 1))
            once = rng.integers(*self.symbols, period)
            weights = np.zeros(2 * period, np.float32)
            weights[period + 1 :] = self.weight
            blocks.append((np.concatenate([once, once]), weights))
            left -= 2 * period
        return _join(blocks, self.length)
