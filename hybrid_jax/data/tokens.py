"""Tokenized documents, end to end in one array: in memory or mapped from the shards of a prepared directory."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from hybrid_jax.data.answers import Answers, shared_prefix
from hybrid_jax.data.chat import ChatTemplate, template_fingerprint
from hybrid_jax.data.documents import Document
from hybrid_jax.data.tokenizer import EosTokenId, added_around, end_of_text_id, load_tokenizer

INDEX = "index.json"
FORMAT = "hybrid_jax tokens 2"
MIXED = "some records are preference pairs ('chosen' and 'rejected') and others are not; put them in two sources"
BATCH = 512  # documents encoded at a time
NOTES = {  # sentences about what an encoder counts; the count comes before them
    "rewritten": "answers are rendered differently because other turns follow (a template may remove earlier thoughts); "
    "they are learned as rendered",
    "absent": "messages that are not the assistant's are not in the rendered text as given: the chat template changes or "
    "ignores them",
    "left_out": "answers are not learned: the chat template renders them so that their place cannot be proven",
    "unanswered": "conversations have no answer to learn",
    "empty": "texts are empty, so that they are only what begins and ends a document",
    "replaced_documents": "documents had bytes that are not UTF-8",
    "replaced_characters": "characters of them were replaced by U+FFFD",
}


class Chain:
    """One-dimensional arrays read as if they were concatenated, without copying more than the slice that is asked for.

    Slices must have a start and a stop, both at least 0, and no step.
    """

    def __init__(self, parts: Sequence[np.ndarray | Chain]):
        self.parts, self.ends = list(parts), np.cumsum([len(p) for p in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, found = where.start, []
        n = bisect.bisect_right(self.ends, begin)
        while begin < where.stop and n < len(self.parts):
            first = self.ends[n] - len(self.parts[n])
            found.append(self.parts[n][begin - first : where.stop - first])
            begin, n = self.ends[n], n + 1
        return np.concatenate(found) if found else self.parts[0][0:0]


def _array(values: np.ndarray | Chain) -> np.ndarray:
    """Returns all values in one array."""
    return values[0 : len(values)]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokenized documents; document i is ids[starts[i]:starts[i + 1]].

    Args:
      ids: [tokens], uint16 or uint32.
      starts: [documents + 1] int64.
      weights: [tokens] uint8, 1 where a token is learned, else 0; None: 1 everywhere.
      text_bytes: size of the text that was tokenized, in UTF-8.
      digest: the `fingerprint` if it is known already, else empty.
      pairs: the documents 2 i and 2 i + 1 are the chosen and the rejected conversation of a preference pair.
    """

    ids: np.ndarray | Chain
    starts: np.ndarray
    weights: np.ndarray | Chain | None = None
    text_bytes: int = 0
    digest: str = ""
    pairs: bool = False

    @property
    def documents(self) -> int:
        """How many documents there are; a pair is one."""
        return (len(self.starts) - 1) // (1 + self.pairs)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the tokens, the beginnings of the documents and the weights."""
        if self.digest:
            return self.digest
        found = hashlib.sha256()
        for values in (self.ids, self.starts, self.weights):
            if values is None:
                found.update(b"none")
                continue
            array = np.ascontiguousarray(_array(values))
            found.update(f"{array.dtype} {array.shape}".encode())
            found.update(array.data)
        return found.hexdigest()

    def save(self, directory: pathlib.Path) -> None:
        """Writes the arrays to a new directory."""
        directory.mkdir(parents=True)
        np.save(directory / "ids.npy", _array(self.ids))
        np.save(directory / "starts.npy", self.starts)
        if self.weights is not None:
            np.save(directory / "weights.npy", _array(self.weights))

    @classmethod
    def join(cls, parts: Sequence[Tokens], dtype: DTypeLike) -> Tokens:
        """Concatenates tokens in memory; without parts the result is empty and has ids of `dtype`."""
        ends = np.cumsum([0] + [len(p.ids) for p in parts])
        starts = [p.starts[:-1] + end for p, end in zip(parts, ends, strict=False)]
        weights = None
        if any(p.weights is not None for p in parts):
            weights = np.concatenate([np.ones(len(p.ids), np.uint8) if p.weights is None else _array(p.weights) for p in parts])
        ids = np.concatenate([np.zeros(0, dtype), *(_array(p.ids) for p in parts)])
        starts = np.concatenate([*starts, ends[-1:]]).astype(np.int64)
        return cls(ids, starts, weights, sum(p.text_bytes for p in parts), pairs=are_pairs(parts))

    @classmethod
    def chained(cls, parts: Sequence[Tokens], dtype: DTypeLike) -> Tokens:
        """Concatenates tokens as `join` does, without reading or copying mapped arrays."""
        if len(parts) == 1:
            return parts[0]
        known = [(p.weights, len(p.ids)) for p in parts]
        weights = [np.broadcast_to(np.uint8(1), n) if w is None else w for w, n in known]
        ends = np.cumsum([0] + [n for _, n in known], dtype=np.int64)
        starts = [p.starts[:-1] + end for p, end in zip(parts, ends, strict=False)]
        return cls(
            Chain([np.zeros(0, dtype), *(p.ids for p in parts)]),
            np.concatenate([*starts, ends[-1:]]),
            Chain(weights) if any(w is not None for w, _ in known) else None,
            sum(p.text_bytes for p in parts),
            pairs=are_pairs(parts),
        )

    @classmethod
    def load(cls, directory: pathlib.Path, text_bytes: int = 0, digest: str = "", pairs: bool = False) -> Tokens:
        """Maps the arrays that `save` wrote; they are read when they are used."""
        weights = directory / "weights.npy"
        return cls(
            np.load(directory / "ids.npy", mmap_mode="r"),
            np.load(directory / "starts.npy"),
            np.load(weights, mmap_mode="r") if weights.exists() else None,
            text_bytes,
            digest,
            pairs,
        )


def are_pairs(parts: Iterable[Tokens]) -> bool:
    """Returns whether the documents of all parts are preference pairs.

    Raises:
      ValueError: those of some are, and those of others are not.
    """
    kinds = {part.pairs for part in parts if part.documents}
    if len(kinds) > 1:
        raise ValueError(MIXED)
    return kinds == {True}


class Encoder:
    """Turns documents into tokens: texts between the ids that begin and end a document, conversations by the chat template.

    A text begins with what the tokenizer itself puts there (see `added_around`) and ends with what it puts after a text,
    else with the end-of-text token.

    Args:
      directory: a model directory with its tokenizer.
      eos_token_id: of the model's config; see `end_of_text_id`.

    Attributes:
      counts: how often each of `NOTES` happened.
    """

    def __init__(self, directory: str | pathlib.Path, eos_token_id: EosTokenId = None):
        self.directory, self.tokenizer = pathlib.Path(directory), load_tokenizer(directory)
        self.begin_ids, after = added_around(self.tokenizer)
        self.end_ids = after or [end_of_text_id(self.tokenizer, eos_token_id)]
        self.end_id = self.end_ids[-1]
        self.dtype = np.dtype(np.uint16 if self.tokenizer.get_vocab_size() <= 2**16 else np.uint32)
        # The post-processor runs even without special tokens. One that trims offsets gives tokens of spaces an empty span, so
        # that a space at an answer's end would not be learned.
        self._untrimmed = Tokenizer.from_str(self.tokenizer.to_str())
        self._untrimmed.post_processor = None
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the tokens of a document, in JSON's types; equal identities give equal tokens."""
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "document_begin": self.begin_ids,
            "document_end": self.end_ids,
            "chat_template": template_fingerprint(self.directory),
        }

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The model directory's chat template, read when the first conversation comes."""
        return ChatTemplate(self.directory)

    def __call__(self, documents: Iterable[Document]) -> Tokens:
        """Encodes documents in order.

        Raises:
          ValueError: there is no chat template for a conversation, or it refuses one; the message names the document.
        """
        documents = list(documents)
        return Tokens.join([self._encoded(documents[i : i + BATCH]) for i in range(0, len(documents), BATCH)], self.dtype)

    def _encoded(self, documents: list[Document]) -> Tokens:
        if len({bool(d.rejected) for d in documents}) > 1:
            raise ValueError(MIXED)
        texts, spans = zip(*(one for d in documents for one in self._rendered(d)), strict=True)
        ids, weights = [], []
        encodings = self._untrimmed.encode_batch(list(texts), add_special_tokens=False)
        for encoding, text, said in zip(encodings, texts, spans, strict=True):
            around = (self.begin_ids, self.end_ids) if said is None else ([], [])
            ids.append(np.asarray([*around[0], *encoding.ids, *around[1]], self.dtype))
            weights.append(np.ones(len(ids[-1]), np.uint8) if said is None else _inside(encoding.offsets, text, said))
        starts = np.cumsum([0] + [len(x) for x in ids], dtype=np.int64)
        chats = any(said is not None for said in spans)
        size = sum(len(text.encode()) for text in texts)
        return Tokens(
            np.concatenate(ids), starts, np.concatenate(weights) if chats else None, size, pairs=bool(documents[0].rejected)
        )

    def _rendered(self, document: Document) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """Returns the text to encode, two of a pair, and the spans of a conversation's answers in it; None for a plain text."""
        if not document.messages:
            self.counts.update(empty=not document.text)
            return [(document.text, None)]
        try:
            found = [self.template.answers(messages) for messages in (document.messages, document.rejected) if messages]
            if document.rejected:
                found = _last_answers(found[0], found[1], sum(m["role"] == "assistant" for m in document.messages))
        except ValueError as e:
            raise ValueError(f"{document.name}: {e}") from None
        for answers in found:
            counted = {name: getattr(answers, name) for name in ("rewritten", "left_out", "absent")}
            self.counts.update(counted, unanswered=not answers.spans)
        return [(answers.text, answers.spans) for answers in found]


def _last_answers(chosen: Answers, rejected: Answers, turns: int) -> list[Answers]:
    """Returns the conversations of a pair with the spans of their last answers alone; the others are the same in both.

    Args:
      turns: the assistant's in each of them.

    Raises:
      ValueError: the template renders the prompts differently, or the place of a last answer could not be proven.
    """
    shared = shared_prefix(chosen.text, rejected.text)
    for answers in (chosen, rejected):
        if not answers.spans or (len(answers.spans) < turns and answers.spans[-1][1] <= shared):
            raise ValueError("the place of a pair's answer in what the chat template renders cannot be proven")
    if chosen.spans[-1][0] != rejected.spans[-1][0] or chosen.spans[-1][0] > shared:
        raise ValueError("the chat template renders the prompt of a pair differently before its two answers")
    return [answers._replace(spans=answers.spans[-1:], left_out=0) for answers in (chosen, rejected)]


def notes(counts: Mapping[str, int]) -> list[str]:
    """Returns a sentence for every count of an encoder that is not 0."""
    return [f"{counts[name]:,} {words}" for name, words in NOTES.items() if counts.get(name)]


def _inside(offsets: Sequence[tuple[int, int]], text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns 1 for the tokens inside one of the spans, else 0: [tokens] uint8.

    The first token of a span may begin with the spaces before it, the last may end with those after it: added tokens include
    them if the tokenizer says `lstrip` or `rstrip`.
    """
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    learned = np.zeros(len(begins), np.uint8)
    for begin, end in spans:
        last = end + len(text[end:]) - len(text[end:].lstrip())
        learned[(begins >= len(text[:begin].rstrip())) & (ends > begin) & (begins < end) & (ends <= last)] = 1
    return learned


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns a hash that is equal for tokenizers that give the same ids."""
    return hashlib.sha256(json.dumps(json.loads(tokenizer.to_str()), sort_keys=True).encode()).hexdigest()


def is_prepared(path: str | pathlib.Path) -> bool:
    """Returns whether a directory holds a finished preparation."""
    return (pathlib.Path(path) / INDEX).is_file()


def load_prepared(
    path: str | pathlib.Path, tokenizer: Tokenizer, identity: Mapping[str, Any] | None = None
) -> tuple[list[Tokens], list[Tokens]]:
    """Returns the (training, held-out) tokens of a prepared directory, shard by shard; empty shards are left out.

    Args:
      path: the prepared directory.
      tokenizer: must be the one that prepared it.
      identity: of the encoder that would make the same tokens, see `Encoder.identity`; None: only the tokenizer is compared.

    Raises:
      ValueError: the tokens were made differently, or have another format; the message says what differs.
    """
    path = pathlib.Path(path)
    index = json.loads((path / INDEX).read_text())
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {index.get('format')!r}, this version reads {FORMAT!r}; prepare it again")
    if index["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{path} was prepared with the tokenizer of {index['tokenizer_from']}, which is not the model's; prepare it again"
        )
    for name, value in (identity or {}).items():
        if index[name] != value and index[name] != "":
            raise ValueError(
                f"{path} was prepared with {name} = {index[name]!r:.40}, this model has {value!r:.40}; prepare it again with "
                "this model's directory"
            )

    def tokens(part: str) -> list[Tokens]:
        shards = [s for s in index["shards"] if s[part]["tokens"]]
        found = [(path / s["name"] / part, s[part]) for s in shards]
        return [Tokens.load(where, s["text_bytes"], s["digest"], s.get("pairs", False)) for where, s in found]

    return tokens("train"), tokens("held_out")
