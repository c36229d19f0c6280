"""Key-value retrieval: pairs, then questions. With keys and values of several tokens it is a phonebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_integer
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Material, Task, check_range, join_blocks

LONGEST = 8  # tokens of a key; 128 symbols to the power of 9 do not fit 64 bits
TRIES = 100  # draws of keys that a text does not have; each nearly always succeeds


def check_pairs(task: str, material: Material, pairs: int, key_tokens: int, value_tokens: int) -> None:
    """Checks that there are keys and values of so many tokens, and so many distinct keys.

    Raises:
      ValueError: names what is out of range.
    """
    check_integer(f"{task}: key_tokens", key_tokens, minimum=1, maximum=LONGEST)
    check_integer(f"{task}: value_tokens", value_tokens, minimum=1)
    material.check_symbols(task, pairs if key_tokens == 1 else 2)
    if (keys := (material.symbols[1] - material.symbols[0]) ** key_tokens) < pairs:
        raise ValueError(f"{task}: there are only {keys} keys of {key_tokens} tokens, fewer than {pairs} pairs")


def distinct_keys(rng: np.random.Generator, symbols: tuple[int, int], number: int, tokens: int) -> np.ndarray:
    """Returns [number, tokens] random symbols whose rows are distinct: numbers to the base of the symbols, without replacement."""
    base = symbols[1] - symbols[0]
    keys = rng.choice(base**tokens, number, replace=False)
    return symbols[0] + keys[:, None] // base ** np.arange(tokens)[::-1] % base


def keys_beside_text(
    rng: np.random.Generator, material: Material, number: int, tokens: int, text: np.ndarray, places: Sequence[int] = (1,)
) -> np.ndarray:
    """Returns keys as `distinct_keys` does, of which the text has none behind a marker of pairs.

    Where a tokenizer has no markers of its own, two tokens of ordinary text serve: one of them with a key behind it would be a
    second answer to the question.

    Args:
      text: token ids, [T].
      places: how many tokens behind the marker a key would begin.
    """
    begins = np.flatnonzero(text == material.pairs_id)
    taken = {tuple(text[begin + place : begin + place + tokens].tolist()) for begin in begins for place in places}
    keys = distinct_keys(rng, material.symbols, number, tokens)
    for _ in range(TRIES):
        if taken.isdisjoint(map(tuple, keys.tolist())):
            break
        keys = distinct_keys(rng, material.symbols, number, tokens)
    return keys


@dataclasses.dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """Blocks of `<pairs> k1 v1 ... kn vn <ask> k5 v5 k2 v2 ...`: every key is asked once, in another order.

    The keys of a block are distinct; values may repeat. A row ends with the first block that does not fit any more, so that blocks
    of many pairs are somewhat rarer in rows than they are drawn.

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
        check_pairs("key-value retrieval", self.material, self.max_pairs, self.key_tokens, self.value_tokens)
        needed = 2 * (self.key_tokens + self.value_tokens) * self.max_pairs + 2
        if self.length < needed:
            raise ValueError(
                f"key-value retrieval of {self.max_pairs} pairs needs rows of {needed} tokens (seq_len) or more, got {self.length}"
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

    @property
    def chance(self) -> float:
        return 1 / (self.material.symbols[1] - self.material.symbols[0])

    def example(self, index: int) -> Row:
        rng = self.generator(index)
        blocks, left = [], self.length
        while len((block := self.block(rng)).ids) <= left:
            blocks.append(block)
            left -= len(block.ids)
        return join_blocks(blocks, self.length)
