"""Key-value retrieval: pairs, then questions. With keys and values of several tokens it is a phonebook."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_integer
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Task, check_range, join_blocks


def distinct_keys(rng: np.random.Generator, symbols: tuple[int, int], number: int, tokens: int) -> np.ndarray:
    """Returns [number, tokens] random symbols whose rows are distinct."""
    if tokens == 1:
        return rng.choice(np.arange(*symbols), number, replace=False)[:, None]
    keys = rng.integers(*symbols, (number, tokens))
    while len(np.unique(keys, axis=0)) < number:
        keys = rng.integers(*symbols, (number, tokens))
    return keys


@dataclasses.dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """Blocks of `<pairs> k1 v1 ... kn vn <ask> k5 v5 k2 v2 ...`: every key is asked once, in another order.

    The keys of a block are distinct; values may repeat. A row holds as many blocks as fit.

    Args:
      min_pairs, max_pairs: pairs per block, drawn uniformly.
      key_tokens, value_tokens: symbols of a key and of a value.
    """

    min_pairs: int = 2
    max_pairs: int = 20
    key_tokens: int = 1
    value_tokens: int = 1

    number: ClassVar[int] = 1

    def __post_init__(self):
        check_range("key-value retrieval", "pairs", self.min_pairs, self.max_pairs)
        for name in ("key_tokens", "value_tokens"):
            check_integer(f"key-value retrieval: {name}", getattr(self, name), minimum=1)
        needed = 2 * (self.key_tokens + self.value_tokens) * self.max_pairs + 2
        if self.length < needed:
            raise ValueError(
                f"key-value retrieval of {self.max_pairs} pairs needs rows of {needed} tokens (seq_len) or more, got {self.length}"
            )
        self.material.check_symbols("key-value retrieval", self.max_pairs if self.key_tokens == 1 else 2)
        if self.key_tokens > 1 and 2 * self.max_pairs > (self.material.symbols[1] - self.material.symbols[0]) ** self.key_tokens:
            raise ValueError(
                f"key-value retrieval: keys of {self.key_tokens} tokens are too few for {self.max_pairs} distinct ones"
            )

    def block(self, rng: np.random.Generator) -> Block:
        """Draws one block: the pairs, then every key with its value in another order."""
        n = int(rng.integers(self.min_pairs, self.max_pairs + 1))
        keys = distinct_keys(rng, self.material.symbols, n, self.key_tokens)
        values = rng.integers(*self.material.symbols, (n, self.value_tokens))
        order = rng.permutation(n)
        pairs, size = np.concatenate([keys, values], 1), self.key_tokens + self.value_tokens
        ids = np.concatenate([[self.material.pairs_id], pairs.reshape(-1), [self.material.ask_id], pairs[order].reshape(-1)])
        is_value = np.tile(np.arange(size) >= self.key_tokens, n)
        weights, distances = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
        weights[n * size + 2 :] = self.weight * is_value
        distances[n * size + 2 :] = np.repeat(n * size + 1 + size * (np.arange(n) - order), size) * is_value
        return Block(ids, weights, distances)

    def example(self, index: int) -> Row:
        rng = self.generator(index)
        blocks, left = [], self.length
        while True:
            block = self.block(rng)
            if len(block.ids) > left:
                return join_blocks(blocks, self.length) if blocks else self.example(int(index) + self.rows)
            blocks.append(block)
            left -= len(block.ids)
