"""Tasks after RULER (arXiv 2404.06654) over token ids: variable tracking, common words, frequent words.

RULER's prompts are English; these have the same structure in the tokens of any tokenizer, so that small models can be trained on
them and nothing is downloaded. A word is a few random symbols.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from hybrid_jax.checks import check_integer, check_number
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks.contract import Block, Material, Task, join_blocks
from hybrid_jax.data.tasks.retrieval import check_pairs, distinct_keys, keys_beside_text


def check_words(task: str, material: Material, words: int, tokens: int) -> None:
    """Checks that there are so many distinct words of so many tokens.

    Raises:
      ValueError: there are fewer.
    """
    try:
        check_pairs(task, material, words, tokens, 1)
    except ValueError as e:
        raise ValueError(str(e).replace("key_tokens", "word_tokens").replace("keys", "words").replace("pairs", "words")) from None


@dataclasses.dataclass(frozen=True)
class VariableTracking(Task):
    """Text with statements `<pairs> X value`, `<pairs> Y X`, ... at random places in this order; `<ask> value X Y ...` at the end.

    All variables of the chain are asked for in their order. Other chains, if there are any, are not asked. RULER has one chain of
    four hops with names of 5 letters. The distance of an answer is that to the name in its own statement.

    Args:
      hops: statements after the first of a chain.
      chains: chains per row.
      word_tokens: symbols of a name and of a value.
    """

    hops: int = 4
    chains: int = 1
    word_tokens: int = 2

    number: ClassVar[int] = 10
    reads_text: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("hops", "chains"):
            check_integer(f"variable tracking: {name}", getattr(self, name), minimum=1)
        if self.material.text is None:
            raise ValueError("variable tracking has statements in text, and there is none: give the task a source of text")
        check_words("variable tracking", self.material, self.chains * (self.hops + 2), self.word_tokens)
        if self.length <= (needed := self._statements + self._question):
            raise ValueError(f"variable tracking needs rows of more than {needed} tokens (seq_len) here, got {self.length}")

    @property
    def _statements(self) -> int:
        return self.chains * (self.hops + 1) * (1 + 2 * self.word_tokens)

    @property
    def _question(self) -> int:
        return 1 + (self.hops + 2) * self.word_tokens

    def example(self, index: int) -> Row:
        assert self.material.text is not None
        rng, w, text = self.generator(index), self.word_tokens, self.material.text(self.length)
        filler = text[int(rng.integers(len(text)))]
        number, within = self.chains * (self.hops + 2), (1, 1 + w)  # a statement's name and its value
        words = keys_beside_text(rng, self.material, number, w, filler["input_ids"], within)
        room = self.length - self._statements - self._question
        chains = words.reshape(self.chains, self.hops + 2, w)  # each [value, first variable, second variable, ...]
        places = np.sort(rng.integers(0, room + 1, (self.chains, self.hops + 1)), axis=1)
        order = sorted((int(places[c, s]), s, rng.random(), c) for c in range(self.chains) for s in range(self.hops + 1))
        ids, weights, named = [], [], {}
        taken = 0
        for place, s, _, c in [*order, (room, -1, 0.0, -1)]:
            ids += filler["input_ids"][taken:place].tolist()
            weights += filler["loss_weights"][taken:place].tolist()
            taken = place
            if c >= 0:
                named[c, s] = len(ids) + 1
                ids += [self.material.pairs_id, *chains[c, s + 1].tolist(), *chains[c, s].tolist()]
                weights += [0.0] * (1 + 2 * w)
        asked = int(rng.integers(self.chains))
        ids += [self.material.ask_id, *chains[asked, 0].tolist()]
        begin = len(ids)
        ids += chains[asked, 1:].reshape(-1).tolist()
        weights += [0.0] * (1 + w) + [self.weight] * ((self.hops + 1) * w)
        distances = np.zeros(self.length, np.int32)
        evidence = [named[asked, s] + t for s in range(self.hops + 1) for t in range(w)]
        distances[begin:] = np.arange(begin, self.length) - evidence
        return join_blocks([Block(np.array(ids), np.array(weights, np.float32), distances)], self.length)


def _asked_words(task: Task, words: np.ndarray, listed: np.ndarray, asked: np.ndarray) -> Row:
    """Returns the row of a list of words, `<ask>`, and the words that are asked for; each one's evidence is its first place."""
    w = words.shape[1]
    ids = np.concatenate([words[listed].reshape(-1), [task.material.ask_id], words[asked].reshape(-1)])
    weights, distances = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
    begin = len(listed) * w + 1
    weights[begin:] = task.weight
    evidence = [w * int(np.flatnonzero(listed == word)[0]) + t for word in asked for t in range(w)]
    distances[begin:] = np.arange(begin, len(ids)) - evidence
    return join_blocks([Block(ids, weights, distances)], task.length)


@dataclasses.dataclass(frozen=True)
class CommonWords(Task):
    """A shuffled list of words of which some are repeated more often; the common ones are asked for, by their first places.

    RULER has 10 common words, 30 times each, among words that stand 3 times; it takes them in any order.

    Args:
      common: how many words are common.
      common_times, other_times: how often a common word and another one stand in the list.
      word_tokens: symbols of a word.
    """

    common: int = 4
    common_times: int = 6
    other_times: int = 2
    word_tokens: int = 2

    number: ClassVar[int] = 11

    def __post_init__(self):
        for name in ("common", "other_times"):
            check_integer(f"common words: {name}", getattr(self, name), minimum=1)
        check_integer("common words: common_times", self.common_times, minimum=self.other_times + 1)
        if self._others < 1:
            raise ValueError(f"common words: a row of {self.length} tokens (seq_len) has no room for a word that is not common")
        check_words("common words", self.material, self.common + self._others, self.word_tokens)

    @property
    def _others(self) -> int:
        """How many other words there are: as many as fit."""
        listed = (self.length - 1) // self.word_tokens - self.common
        return (listed - self.common * self.common_times) // self.other_times

    def example(self, index: int) -> Row:
        rng = self.generator(index)
        words = distinct_keys(rng, self.material.symbols, self.common + self._others, self.word_tokens)
        times = [self.common_times] * self.common + [self.other_times] * self._others
        listed = rng.permutation(np.repeat(np.arange(len(words)), times))
        first = [int(np.flatnonzero(listed == word)[0]) for word in range(self.common)]
        return _asked_words(self, words, listed, np.argsort(first))


@dataclasses.dataclass(frozen=True)
class FrequentWords(Task):
    """A shuffled list of words whose frequencies follow Zipf's law; ranks 2 to `asked` + 1 are asked for, the most frequent first.

    Word k stands about n k^-alpha / zeta(alpha) times in a list of n. Rank 1 is noise, here the marker of pairs, as RULER's dots
    are. RULER asks for three words.

    Args:
      alpha: of Zipf's law, above 1.
      asked: how many words are asked for.
      word_tokens: symbols of a word.
    """

    alpha: float = 2.0
    asked: int = 3
    word_tokens: int = 2

    number: ClassVar[int] = 12

    def __post_init__(self):
        check_number("frequent words: alpha", self.alpha, above=1)
        check_integer("frequent words: asked", self.asked, minimum=1)
        counts = self.counts()
        if len(counts) < self.asked + 2 or (np.diff(counts[: self.asked + 2]) >= 0).any():
            raise ValueError(
                f"frequent words: in rows of {self.length} tokens (seq_len) the {self.asked} words that are asked for do not have "
                "different frequencies; make rows longer, or ask for fewer"
            )
        check_words("frequent words", self.material, len(counts), self.word_tokens)

    def counts(self) -> np.ndarray:
        """Returns how often each word stands in the list, by rank; words that would not stand in it are left out."""
        listed = (self.length - 1) // self.word_tokens - self.asked
        ranks = np.arange(1, max(listed, 1) + 1, dtype=np.float64)
        shares = ranks**-self.alpha
        counts = np.floor(listed * shares / shares.sum()).astype(int)
        return counts[counts > 0]

    def example(self, index: int) -> Row:
        rng, counts = self.generator(index), self.counts()
        words = distinct_keys(rng, self.material.symbols, len(counts), self.word_tokens)
        words[0] = self.material.pairs_id
        listed = rng.permutation(np.repeat(np.arange(len(words)), counts))
        return _asked_words(self, words, listed, np.arange(1, self.asked + 1))
