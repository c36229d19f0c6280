"""The tokenized sources that an experiment reads, their held-out parts, and the synthetic tasks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hybrid_jax.data.documents import Document, content, load_documents, pieces, split_documents, unread_files
from hybrid_jax.data.packing import LONG, PACKINGS, PAIRS, PackedRows, Rows, check_long
from hybrid_jax.data.stamps import stamp
from hybrid_jax.data.tasks import TASKS, Material, Task, check_options, make_task
from hybrid_jax.data.tokenizer import ASK, EosTokenId, ordinary_ids
from hybrid_jax.data.tokenizer import PAIRS as PAIRS_TOKEN
from hybrid_jax.data.tokens import INDEX, Encoder, Tokens, are_pairs, is_prepared, load_prepared, notes
from hybrid_jax.files import file_hash
from hybrid_jax.parallel.distributed import say

# Synthetic tasks draw from this many token ids: the first ordinary ones (the single bytes of a byte-level BPE).
NUM_SYMBOLS = 128


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from and how they fill rows.

    Args:
      path: a source as `documents.pieces` takes it, or a directory that `prepare` made.
      packing: `split` or `first_fit`, see `PackedRows`; empty: `first_fit` for conversations, `split` for texts; preference pairs
        have rows of their own (`packing.PAIRS`), which cannot be chosen.
      long: what happens to a document longer than a row, see `first_fit_plan`.

    Raises:
      ValueError: an unknown `packing` or `long`, or a `long` that has no effect.
    """

    path: str
    packing: str = ""
    long: str = "split"

    def __post_init__(self):
        for name, allowed in (("packing", ("", *PACKINGS)), ("long", LONG)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(filter(None, allowed))}")
        check_long(self.packing, self.long)


def read_sources(data: Mapping[str, Any]) -> dict[str, Source]:
    """Returns the sources of a config's `data` by name.

    Args:
      data: has `text`, a path, or `sources`, which maps names to {path, packing, long}, or both.

    Raises:
      ValueError: there is no source, an unknown key or value, or a source has the name of a synthetic task.
    """
    given = {"text": {"path": data["text"]}} if data.get("text") else {}
    if given and "text" in (data.get("sources") or {}):
        raise ValueError("config.data has 'text', and a source of that name in 'sources'; rename one of them")
    given |= dict(data.get("sources") or {})
    if not given:
        raise ValueError("config.data needs 'text' or 'sources'")
    found = {}
    for name, values in given.items():
        if name in read_tasks(data):
            raise ValueError(f"data.sources.{name}: that name is a synthetic task's; choose another")
        try:
            found[name] = Source(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"data.sources.{name}: {e}") from None
        if not isinstance(found[name].path, str) or not found[name].path:
            raise ValueError(f"data.sources.{name}.path must name a source, got {found[name].path!r}")
    return found


def check_sources(data: Mapping[str, Any]) -> None:
    """Checks that every source of text of a config's `data` is there, without reading it.

    Raises:
      ValueError: see `read_sources`. FileNotFoundError: a source is not there.
    """
    for source in read_sources(data).values():
        if not is_prepared(source.path):
            pieces(source.path)


def read_tasks(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the synthetic tasks of a config's `data` by name: {"task": a name of `TASKS`, and options that are not the defaults}.

    Every task of `TASKS` is there by its own name with its defaults, unless `data` has that name.

    Args:
      data: may have `tasks`, which maps names to {task, options ...}.

    Raises:
      ValueError: an unknown task or option.
    """
    found: dict[str, dict[str, Any]] = {name: {"task": name} for name in TASKS}
    for name, values in (data.get("tasks") or {}).items():
        values = dict(values)
        try:
            check_options(values.get("task", ""), set(values) - {"task"})
        except ValueError as e:
            raise ValueError(f"data.tasks.{name}: {e}") from None
        found[name] = values
    return found


def source_stamp(path: str) -> list[Any]:
    """Returns a value that changes when the text of a source changes.

    It holds the size and time of every file, or a hash of a prepared directory's index.
    """
    return [file_hash(pathlib.Path(path) / INDEX)] if is_prepared(path) else [stamp(piece, path) for piece in pieces(path)]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized sources by name, with their held-out parts, and the token ids that the synthetic tasks use.

    Args:
      tokenizer: made the tokens.
      sources: where each source comes from and how it fills rows.
      train: the training part of each source, shard by shard.
      held_out: the held-out part of each source, shard by shard; a part may be empty.
      markers: the ids that begin the pairs and the questions of key-value retrieval.
      symbols: the synthetic tasks draw from the ids symbols[0] ... symbols[1] - 1.
      encoding: what decides the tokens of a text, see `Encoder.identity`.
      tasks: the synthetic tasks by name, see `read_tasks`.
    """

    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    train: Mapping[str, list[Tokens]]
    held_out: Mapping[str, list[Tokens]]
    markers: tuple[int, int]
    symbols: tuple[int, int]
    encoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: read_tasks({}))

    def identity(self, mix: Mapping[str, float]) -> dict[str, Any]:
        """Returns everything but length and order that decides the rows of a mix, in JSON's types.

        That is how text became tokens and, for each source with a share, a hash of its tokens and how they are packed. Equal
        rows have equal identities, whatever the paths of the sources are.
        """
        found: dict[str, Any] = dict(self.encoding)
        for name in sorted(n for n, share in mix.items() if share):
            if name in self.tasks:
                found[name] = [*self.markers, *self.symbols, dict(self.tasks[name])]
                if TASKS[self.tasks[name]["task"]].reads_text:
                    found[name].append(self._digest(self.first_text))
                continue
            source = self.sources[name]
            found[f"{name}.tokens"] = self._digest(name)
            found[f"{name}.packing"] = self._packing(name, self.train[name])
            found[f"{name}.long"] = source.long
        return json.loads(json.dumps(found))

    def _digest(self, name: str) -> str:
        """Returns a hash of the training tokens of a source."""
        return hashlib.sha256(json.dumps([tokens.fingerprint for tokens in self.train[name]]).encode()).hexdigest()

    def task(self, name: str, length: int, seed: int, weight: float = 1.0, held_out: bool = False, **options: Any) -> Task:
        """Returns the rows of a synthetic task.

        Args:
          name: of `tasks`.
          length: tokens per row.
          seed: decides the rows.
          weight: of an answer in the loss.
          held_out: whether text that a task stands in is of the held-out part of `first_text`, or of its training part.
          options: replace those that the task has here.

        Raises:
          ValueError: no task has that name, or an option is unknown or out of range.
        """
        if name not in self.tasks:
            raise ValueError(f"no synthetic task is named {name!r}; have {', '.join(self.tasks)}")
        given = {**self.tasks[name], **options}
        sources, part = (self.held_out, "held-out") if held_out else (self.train, "training")

        @functools.cache
        def text(length: int) -> PackedRows:
            return self._packed(self.first_text, sources[self.first_text], length, part, "split")  # filler has no padding

        return make_task(given.pop("task"), given, Material(self.symbols, *self.markers, text), length, seed=seed, weight=weight)

    def rows(self, name: str, length: int, seed: int, answer_weight: float = 1.0) -> Rows:
        """Returns the training rows of one source, or of a synthetic task (see `read_tasks`).

        Args:
          name: of the source or the task.
          length: tokens per row.
          seed: decides the rows of a synthetic task.
          answer_weight: weight of a synthetic task's answers in the loss.

        Raises:
          ValueError: nothing has that name, or the training part does not fill one row.
        """
        if name in self.tasks:
            return self.task(name, length, seed, answer_weight)
        if name not in self.train:
            raise ValueError(f"unknown data source {name!r} in data.mix; have {', '.join([*self.train, *self.tasks])}")
        return self._packed(name, self.train[name], length, "training")

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the sources that are no preference pairs, in their order."""
        return tuple(name for name in self.train if not self.has_pairs(name))

    @property
    def first_text(self) -> str:
        """The name of the first source that is no preference pairs.

        Raises:
          ValueError: there is none.
        """
        if not self.texts:
            raise ValueError("every source has preference pairs, whose next-token loss says nothing; name a source of text too")
        return self.texts[0]

    def held_out_rows(self, length: int, name: str | None = None, pairs: bool = False) -> PackedRows:
        """Returns the rows of a source's held-out part.

        Args:
          length: tokens per row.
          name: of the source; default: `first_text`.
          pairs: whether the source has preference pairs, whose rows only the objective `dpo` reads.

        Raises:
          ValueError: no source has that name, or its held-out part does not fill one row; or it has pairs, and is not to have them.
        """
        name = self.first_text if name is None else name
        if name not in self.held_out:
            raise ValueError(f"no source is named {name!r}; have {', '.join(self.held_out)}")
        if self.has_pairs(name) != pairs:
            raise ValueError(f"{name} has {'no' if pairs else 'preference'} pairs; name one of the sources {', '.join(self.texts)}")
        return self._packed(name, self.held_out[name], length, "held-out")

    def held_out_tokens(self) -> dict[str, int]:
        """Returns the number of held-out tokens of every source, by the sources' names in their order."""
        return {name: sum(int(tokens.starts[-1]) for tokens in shards) for name, shards in self.held_out.items()}

    def has_pairs(self, name: str) -> bool:
        """Returns whether a source, or a synthetic task, has preference pairs."""
        return name in self.train and are_pairs((*self.train[name], *self.held_out.get(name, ())))

    def _packing(self, name: str, shards: list[Tokens]) -> str:
        if self.has_pairs(name):
            if given := self.sources[name].packing:
                raise ValueError(f"data.sources.{name} has preference pairs, which are not packed by {given!r}; leave packing out")
            return PAIRS
        return self.sources[name].packing or ("first_fit" if any(t.weights is not None for t in shards) else "split")

    def _pack(self, name: str, shards: list[Tokens], length: int, packing: str) -> PackedRows:
        """Packs the documents of all shards end to end, so that the rows do not depend on how the source is divided.

        Args:
          packing: in place of the source's; empty: the source's.
        """
        how, long = (packing, "split") if packing else (self._packing(name, shards), self.sources[name].long)
        try:
            return PackedRows(Tokens.chained(shards, np.uint32), length, how, long)
        except ValueError as e:
            raise ValueError(f"data.sources.{name}: {e}") from None

    def _packed(self, name: str, shards: list[Tokens], length: int, part: str, packing: str = "") -> PackedRows:
        """Packs a part of a source, and refuses one that does not fill a row."""
        rows = self._pack(name, shards, length, packing)
        if not len(rows):
            raise ValueError(
                f"the {part} part of the source {name!r} has {rows.tokens.starts[-1]:,} tokens and fills no row of {length:,}"
                f"{f' ({rows.unused})' if rows.unused else ''}; give more text, or lower seq_len"
            )
        return rows


def read_corpus(data: Mapping[str, Any], directory: str | pathlib.Path, eos_token_id: EosTokenId = None) -> Corpus:
    """Loads prepared sources and tokenizes the others; prints how much of each source is held out.

    Also printed is how many training documents are held out in some source too, word for word; documents of prepared sources
    are not compared.

    Args:
      data: `text` or `sources` or both, see `read_sources`.
      directory: of the model whose tokenizer is used.
      eos_token_id: of the model's config, see `end_of_text_id`.

    Raises:
      ValueError: a source does not exist or cannot be read, or was prepared with another tokenizer.
    """
    sources, tasks, encode = read_sources(data), read_tasks(data), Encoder(directory, eos_token_id)
    train: dict[str, list[Tokens]] = {}
    held_out: dict[str, list[Tokens]] = {}
    contents: dict[str, tuple[list[bytes], set[bytes]]] = {}  # of the training and the held-out documents
    for name, source in sources.items():
        if is_prepared(source.path):
            train[name], held_out[name] = load_prepared(source.path, encode.tokenizer, encode.identity)
        else:
            if unread := unread_files(source.path):
                say(f"{name}: {unread}")
            encode.counts.clear()
            parts = split_documents(load_documents(source.path))
            contents[name] = [content(d) for d in parts[0]], {content(d) for d in parts[1]} - {content(Document(""))}
            train[name], held_out[name] = ([encode(part)] for part in parts)
            for note in notes(encode.counts):
                say(f"{name}: {note}")
    for name, (trained, _) in contents.items():
        for other, (_, evaluated) in contents.items():
            if repeated := sum(document in evaluated for document in trained):
                say(f"{name}: {repeated:,} training documents are held-out documents of {other} too, word for word")
    pairs_id, ask_id = (encode.tokenizer.token_to_id(t) for t in (PAIRS_TOKEN, ASK))
    ordinary = ordinary_ids(encode.tokenizer, 2 + NUM_SYMBOLS)
    if pairs_id is None or ask_id is None:  # a foreign tokenizer: its first two ordinary ids serve as markers
        (pairs_id, ask_id), ordinary = ordinary[:2], ordinary[2:]
    ordinary = ordinary[:NUM_SYMBOLS]
    symbols = (ordinary.start, ordinary.stop)
    corpus = Corpus(encode.tokenizer, sources, train, held_out, (pairs_id, ask_id), symbols, encode.identity, tasks)
    say("held out: " + ", ".join(f"{tokens:,} tokens of {name}" for name, tokens in corpus.held_out_tokens().items()))
    return corpus
