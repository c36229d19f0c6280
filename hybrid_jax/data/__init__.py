"""Data: text and synthetic rows, mixed and batched by grain.

The global order of batches depends on the seed and the step alone; the iterator's state is in the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import grain
import numpy as np
from tokenizers import Tokenizer

from hybrid_jax.data.packing import PackedRows, tokenize
from hybrid_jax.data.synthetic import Induction, KeyValueRetrieval
from hybrid_jax.data.text import Document, load_documents, split_documents
from hybrid_jax.data.tokenizer import ASK, PAIRS, SPECIAL_TOKENS, end_of_text_id, load_tokenizer

__all__ = ["Corpus", "load_documents", "load_tokenizer", "make_corpus", "training_batches"]

HELD_OUT_SEED = 987_654_321
# Synthetic tasks draw from so many token ids, the first ordinary ones (a byte-level BPE's single bytes).
NUM_SYMBOLS = 128


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text, its held-out part, and what the synthetic tasks need of the tokenizer."""

    tokenizer: Tokenizer
    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]
    held_out_bytes: int
    markers: tuple[int, int]
    symbols: tuple[int, int]

    def retrieval(self, length: int, seed: int, **options) -> KeyValueRetrieval:
        return KeyValueRetrieval(length, self.symbols, *self.markers, seed=seed, **options)

    def source(self, name: str, length: int, seed: int, answer_weight: float = 1.0):
        """Training rows of one kind: `text`, `retrieval` or `induction`.

        Raises:
          ValueError: no source has that name.
        """
        sources = {
            "text": lambda: PackedRows(*self.train, length),
            "retrieval": lambda: self.retrieval(length, seed, weight=answer_weight),
            "induction": lambda: Induction(length, self.symbols, seed=seed, weight=answer_weight),
        }
        if name not in sources:
            raise ValueError(f"unknown data source {name!r} in data.mix; have {', '.join(sources)}")
        return sources[name]()

    def held_out_rows(self, length: int) -> PackedRows:
        return PackedRows(*self.held_out, length)


def make_corpus(documents: list[Document], tokenizer: Tokenizer, eos_token_id=None) -> Corpus:
    """Splits and tokenises documents (see `load_documents`)."""
    train, held_out = split_documents(documents)
    end = end_of_text_id(tokenizer, eos_token_id)
    markers = [tokenizer.token_to_id(t) for t in (PAIRS, ASK)]
    if None in markers:  # a foreign tokenizer: any two ids serve as markers, the first two ordinary ones
        markers = [1, 2]
    return Corpus(
        tokenizer=tokenizer,
        train=tokenize(train, tokenizer, end),
        held_out=tokenize(held_out, tokenizer, end),
        held_out_bytes=sum(len(d.text.encode()) for d in held_out),
        markers=tuple(markers),
        symbols=(len(SPECIAL_TOKENS), min(len(SPECIAL_TOKENS) + NUM_SYMBOLS, tokenizer.get_vocab_size())),
    )


def training_batches(
    corpus: Corpus, mix: Mapping[str, float], *, batch_size: int, length: int, seed: int, answer_weight: float = 1.0
):
    """An endless, checkpointable iterator of batches {input_ids, segment_ids, loss_weights} [B, length].

    Args:
      answer_weight: weight of the answers of synthetic rows.
      mix: source name -> share of the rows; shares need not sum to one, zeros are left out.

    Raises:
      ValueError: an unknown source, or no positive share.
    """
    shares = {name: share for name, share in sorted(mix.items()) if share}
    if not shares or min(shares.values()) < 0:
        raise ValueError(f"data.mix needs at least one positive share and no negative one, got {dict(mix)}")
    sources = [corpus.source(name, length, seed, answer_weight) for name in shares]
    parts = [grain.MapDataset.source(source).shuffle(seed=seed + n).repeat() for n, source in enumerate(sources)]
    mixed = grain.MapDataset.mix(parts, weights=list(shares.values()))
    return iter(mixed.batch(batch_size, drop_remainder=True).to_iter_dataset(grain.ReadOptions(num_threads=1)))
