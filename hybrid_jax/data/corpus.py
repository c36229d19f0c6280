"""What an experiment reads: its sources tokenised, their held-out parts, and the synthetic tasks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hybrid_jax.data.documents import Document, content, load_documents, pieces, split_documents, unread_files
from hybrid_jax.data.packing import LONG, PACKINGS, PackedRows, check_long
from hybrid_jax.data.stamps import stamp
from hybrid_jax.data.synthetic import Induction, KeyValueRetrieval
from hybrid_jax.data.tokenizer import ASK, PAIRS, ordinary_ids
from hybrid_jax.data.tokens import INDEX, Encoder, Tokens, is_prepared, load_prepared, notes
from hybrid_jax.files import file_hash
from hybrid_jax.parallel.distributed import say

# Synthetic tasks draw from so many token ids, the first ordinary ones (a byte-level BPE's single bytes).
NUM_SYMBOLS = 128
SYNTHETIC = ("retrieval", "induction")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from and how they fill rows.

    Args:
      path: see `documents.pieces`, or a directory that `prepare` made.
      packing, long: see `PackedRows`; by default conversations are packed whole, texts split in rows.
    """

    path: str
    packing: str = ""
    long: str = "split"

    def __post_init__(self):
        for name, allowed in (("packing", ("", *PACKINGS)), ("long", LONG)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(filter(None, allowed))}")
        check_long(self.packing, self.long)


def read_sources(data: Mapping) -> dict[str, Source]:
    """The sources of a config's `data`: `text`, a path, and `sources`, name -> {path, packing, long}.

    Raises:
      ValueError: none, an unknown key or value, or a name that a synthetic task has.
    """
    given = {"text": {"path": data["text"]}} if data.get("text") else {}
    if given and "text" in (data.get("sources") or {}):
        raise ValueError("config.data has 'text', and a source of that name in 'sources'; rename one of them")
    given |= dict(data.get("sources") or {})
    if not given:
        raise ValueError("config.data needs 'text' or 'sources'")
    found = {}
    for name, values in given.items():
        if name in SYNTHETIC:
            raise ValueError(f"data.sources.{name}: that name is a synthetic task's; choose another")
        try:
            found[name] = Source(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"data.sources.{name}: {e}") from None
        if not isinstance(found[name].path, str) or not found[name].path:
            raise ValueError(f"data.sources.{name}.path must name a source, got {found[name].path!r}")
    return found


def source_stamp(path: str) -> list:
    """What changes when the text of a source changes: the size and time of every file, or a prepared directory's index."""
    return [file_hash(pathlib.Path(path) / INDEX)] if is_prepared(path) else [stamp(piece, path) for piece in pieces(path)]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized sources by name, with their held-out parts, and what the synthetic tasks need of the tokenizer.

    Args:
      encoding: what decides the tokens of a text, see `Encoder.identity`.
    """

    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    train: Mapping[str, list[Tokens]]
    held_out: Mapping[str, list[Tokens]]
    markers: tuple[int, int]
    symbols: tuple[int, int]
    encoding: Mapping = dataclasses.field(default_factory=dict)

    def identity(self, mix: Mapping[str, float]) -> dict[str, Any]:
        """What the rows of a mix are made of, beside their length and order: how text became tokens, and of each source the
        tokens and how they are packed. The same for the same rows, whatever the sources' paths are."""
        found = dict(self.encoding)
        for name in sorted(n for n, share in mix.items() if share):
            if name in SYNTHETIC:
                found[name] = [*self.markers, *self.symbols]
                continue
            source, digests = self.sources[name], [tokens.fingerprint for tokens in self.train[name]]
            found[f"{name}.tokens"] = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
            found[f"{name}.packing"] = self._packing(name, self.train[name])
            found[f"{name}.long"] = source.long
        return json.loads(json.dumps(found))

    def retrieval(self, length: int, seed: int, **options) -> KeyValueRetrieval:
        return KeyValueRetrieval(length, self.symbols, *self.markers, seed=seed, **options)

    def rows(self, name: str, length: int, seed: int, answer_weight: float = 1.0):
        """Training rows of one source, or of a synthetic task (`retrieval`, `induction`).

        Raises:
          ValueError: nothing has that name, or it does not fill one row.
        """
        if name == "retrieval":
            return self.retrieval(length, seed, weight=answer_weight)
        if name == "induction":
            return Induction(length, self.symbols, seed=seed, weight=answer_weight)
        if name not in self.train:
            raise ValueError(f"unknown data source {name!r} in data.mix; have {', '.join([*self.train, *SYNTHETIC])}")
        return self._packed(name, self.train[name], length, "training")

    def held_out_rows(self, length: int, name: str = "") -> PackedRows:
        """Rows of a source's held-out part; default: the first source's."""
        name = name or next(iter(self.held_out))
        return self._packed(name, self.held_out[name], length, "held-out")

    def _packing(self, name: str, shards: list[Tokens]) -> str:
        return self.sources[name].packing or ("first_fit" if any(t.weights is not None for t in shards) else "split")

    def _packed(self, name: str, shards: list[Tokens], length: int, part: str) -> PackedRows:
        """Rows of the shards' documents end to end, so that the rows do not depend on how the source is divided."""
        tokens = Tokens.chained(shards, np.uint32)
        try:
            rows = PackedRows(tokens, length, self._packing(name, shards), self.sources[name].long)
        except ValueError as e:
            raise ValueError(f"data.sources.{name}: {e}") from None
        if not len(rows):
            raise ValueError(
                f"the {part} part of the source {name!r} has {tokens.starts[-1]:,} tokens and fills no row of {length:,}"
                f"{f' ({rows.unused})' if rows.unused else ''}; give more text, or lower seq_len"
            )
        return rows


def read_corpus(data: Mapping, directory: str | pathlib.Path, eos_token_id=None) -> Corpus:
    """Reads and tokenizes what is not prepared.

    Of what is not prepared, training documents that are in the first source's held-out part too are counted.

    Args:
      data: `text` and/or `sources`, see `read_sources`.
      directory: of the model whose tokenizer it is.
      eos_token_id: of the model's config.

    Raises:
      ValueError: a source is not there or cannot be read, or another tokenizer prepared it.
    """
    sources, encode = read_sources(data), Encoder(directory, eos_token_id)
    train, held_out, first, evaluated = {}, {}, next(iter(sources)), set()
    for name, source in sources.items():
        if is_prepared(source.path):
            train[name], held_out[name] = load_prepared(source.path, encode.tokenizer, encode.identity)
        else:
            if unread := unread_files(source.path):
                say(f"{name}: {unread}")
            encode.counts.clear()
            parts = split_documents(load_documents(source.path))
            if name == first:
                evaluated = {content(d) for d in parts[1]} - {content(Document(""))}
            if repeated := sum(content(d) in evaluated for d in parts[0]):
                say(f"{name}: {repeated:,} training documents are held-out documents of {first} too, word for word")
            train[name], held_out[name] = ([encode(part)] for part in parts)
            for note in notes(encode.counts):
                say(f"{name}: {note}")
    markers = [encode.tokenizer.token_to_id(t) for t in (PAIRS, ASK)]
    ordinary = ordinary_ids(encode.tokenizer, len(markers) + NUM_SYMBOLS)
    if None in markers:  # a foreign tokenizer: any two ids serve as markers, the first two ordinary ones
        markers, ordinary = [*ordinary[:2]], ordinary[2:]
    ordinary = ordinary[:NUM_SYMBOLS]
    symbols = (ordinary.start, ordinary.stop)
    return Corpus(encode.tokenizer, sources, train, held_out, tuple(markers), symbols, encode.identity)
