"""Loss on held-out text: nats per token, perplexity, bits per byte; by source and by position in the row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer, decoders

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject, check_counts, check_rows
from hybrid_jax.evaluate.measurement import Measurement, buckets, weighted_mean
from hybrid_jax.evaluate.measures import evenly_spaced
from hybrid_jax.evaluate.token_scores import token_scores


@dataclasses.dataclass(frozen=True)
class TextLoss(Instrument):
    """Measures the loss on rows of held-out text.

    The measures are `loss`, `perplexity` (its exponential) and `bits_per_byte` (comparable between tokenizers); of several
    sources also each one's `loss` at {"source": name}; and `loss` at {"position": p}, over the tokens at positions up to p
    and above the next smaller p. Positions count from 0 in a row, whatever its documents are.

    Args:
      sources: names of the evaluation's sources; empty: all of them.
      seq_len: tokens per row.
      rows: evenly spaced rows of each source's held-out part; all where there are fewer.
      batch_size: rows at a time.
    """

    headline: ClassVar[tuple[str, ...]] = ("loss",)

    sources: tuple[str, ...] = ()
    seq_len: int = 1024
    rows: int = 64
    batch_size: int = 8

    def __post_init__(self):
        check_counts(self, "seq_len", "rows", "batch_size")

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        check_rows("text", config, mesh, self.batch_size, self.seq_len)
        if unknown := [name for name in self.sources if name not in corpus.held_out]:
            raise ValueError(f"text: no source is named {unknown[0]!r}; have {', '.join(corpus.held_out)}")
        for name in self.names(corpus):
            corpus.held_out_rows(self.seq_len, name)

    def names(self, corpus: Corpus) -> tuple[str, ...]:
        """Returns the names of the sources that are measured."""
        return self.sources or corpus.texts

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        places, rows = [], []
        for name in self.names(subject.corpus):
            packed = subject.corpus.held_out_rows(self.seq_len, name)
            found = [packed[i] for i in evenly_spaced(len(packed), self.rows)]
            places += [name] * len(found)
            rows += found
        scores = token_scores(
            subject.model, rows, mesh=subject.mesh, batch_size=self.batch_size, progress=lambda n: progress(n, len(rows))
        )
        losses, weights = scores.losses, (scores.weights > 0).astype(np.float32)
        loss = weighted_mean("loss", losses, weights, "nats/token")
        if loss is None:
            raise ValueError("text: the held-out rows have no token that another one predicts")
        with np.errstate(over="ignore"):  # of a model that diverged it is infinite
            ends = {name: float(np.exp(getattr(loss, name))) for name in ("value", "low", "high")}
        perplexity = dataclasses.replace(loss, measure="perplexity", unit="", sums=(), **ends)
        size = np.array([_bytes(subject.tokenizer, row) for row in rows], np.float64)
        nats = np.sum(losses, axis=1, where=weights > 0, dtype=np.float64)
        bits = weighted_mean("bits_per_byte", nats / np.maximum(size, 1) / math.log(2), size, "bits/byte")
        found = [loss, perplexity, bits]
        if len(set(places)) > 1:
            chosen = {name: np.array([place == name for place in places]) for name in dict.fromkeys(places)}
            found += [weighted_mean("loss", losses[c], weights[c], "nats/token", source=name) for name, c in chosen.items()]
        for low, high in buckets(self.seq_len - 1):
            part = np.s_[:, low + 1 : high + 1]
            found.append(weighted_mean("loss", losses[part], weights[part], "nats/token", position=high))
        return [m for m in found if m is not None]


def _bytes(tokenizer: Tokenizer, row: Mapping[str, np.ndarray]) -> int:
    """Returns the bytes of the tokens of a row that count in the loss; at least 1 if there are any, e.g. only an end of text.

    The tokens of a byte-level tokenizer are counted one by one, as their bytes may be parts of characters at the ends of a row.
    """
    ids = row["input_ids"][row["loss_weights"] > 0].tolist()
    if not ids:
        return 0
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return max(len(tokenizer.decode(ids, skip_special_tokens=True).encode()), 1)
    added = {i: 0 if t.special else len(t.content.encode()) for i, t in tokenizer.get_added_tokens_decoder().items()}
    return max(sum(added[i] if i in added else len(tokenizer.id_to_token(i) or "") for i in ids), 1)
