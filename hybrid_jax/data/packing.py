"""Rows of a fixed length packed from tokenized documents, with segments.

A row is a dict of [length]: `input_ids`, `segment_ids` (1, 2, ... within the row; 0 is padding), `loss_weights` (the
weight of predicting this token from those before it: 0 for the first of a segment). Row i is a function of the documents
and i alone.

Rows of preference pairs (`PAIRS`) hold each pair in two segments, one after the other: segment 2 n - 1 is the chosen conversation
of the row's n-th pair, segment 2 n the rejected one. So a pair is always in one microbatch and on the devices of one row, every row
has the same shape, and a row has little padding unless its pairs are so short that it holds `PAIRS_IN_ROW` of them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hybrid_jax.data.tokens import Tokens

PACKINGS = ("split", "first_fit")
PAIRS = "pairs"
PAIRS_IN_ROW = 64  # at most; the objective then sums over so many segments without a scatter, also where tokens are sharded
LONG = ("split", "truncate", "drop")
OPEN_ROWS = 64  # how many of the newest rows first-fit tries to fill

Row = dict[str, np.ndarray]
"""`input_ids` int32, `segment_ids` int32 and `loss_weights` float32, each [length]; see the module."""


class Rows(Protocol):
    """Rows that can be read by number: those of a source (`PackedRows`) or of a synthetic task."""

    @property
    def unused(self) -> str:
        """A sentence about tokens that are in no row; empty if there are none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class Plan:
    """Which tokens fill which row.

    Args:
      begin, size: [pieces], piece p is the tokens begin[p] ... begin[p] + size[p] - 1.
      first: [rows + 1], row r holds the pieces first[r] ... first[r + 1] - 1.
    """

    def __init__(self, begin: np.ndarray, size: np.ndarray, first: np.ndarray):
        self.begin, self.size, self.first = begin, size, first

    def __len__(self) -> int:
        return len(self.first) - 1


def split_plan(starts: np.ndarray, length: int) -> Plan:
    """Returns the plan that splits the stream of documents every `length` tokens.

    There is no padding; the tokens after the last full row are not used.

    Args:
      starts: [documents + 1], see `Tokens`.
      length: tokens per row.
    """
    end = int(starts[-1]) // length * length
    first_of_row = np.arange(0, end + 1, length)
    begin = np.union1d(starts[starts < end], first_of_row[:-1]).astype(np.int64)
    size = np.diff(np.append(begin, end)).astype(np.int32)
    return Plan(begin[size > 0], size[size > 0], np.searchsorted(begin[size > 0], first_of_row))


def first_fit_plan(starts: np.ndarray, length: int, long: str, least: int = 0) -> Plan:
    """Returns the plan that puts each document, undivided, in the first of the newest `OPEN_ROWS` rows that has room for it.

    Args:
      starts: [documents + 1], see `Tokens`.
      length: tokens per row.
      long: what happens to a document longer than a row: `split` into rows and a rest, `truncate` to its first row, or `drop`.
      least: every document takes at least the room of so many tokens, which bounds how many a row holds.
    """
    begin, size = np.asarray(starts[:-1], np.int64), np.diff(starts)
    if long == "drop":
        keep = size <= length
        begin, size = begin[keep], size[keep]
    elif long == "truncate":
        size = np.minimum(size, length)
    else:
        parts = -(-size // length)
        nth = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        begin = np.repeat(begin, parts) + nth * length
        size = np.minimum(np.repeat(size, parts) - nth * length, length)
    begin, size = begin[size > 0], size[size > 0].astype(np.int32)
    row_of = np.empty(len(size), np.int64)
    room, rows = np.zeros(OPEN_ROWS, np.int64), np.zeros(OPEN_ROWS, np.int64)
    opened, oldest = 0, 0
    for i, n in enumerate(np.maximum(size, least).tolist()):
        slot = int(np.argmax(room >= n))
        if room[slot] < n:
            slot, oldest = oldest, (oldest + 1) % OPEN_ROWS
            rows[slot], room[slot] = opened, length
            opened += 1
        row_of[i] = rows[slot]
        room[slot] -= n
    order = np.argsort(row_of, kind="stable")
    return Plan(begin[order], size[order], np.searchsorted(row_of[order], np.arange(opened + 1)))


def pairs_plan(starts: np.ndarray, length: int) -> Plan:
    """Returns the plan that places pairs of documents as `first_fit_plan` places documents; those longer than a row are in none.

    Args:
      starts: [2 pairs + 1], see `Tokens`.
      length: tokens per row.

    Returns:
      Of each pair two pieces; a row holds at most `PAIRS_IN_ROW` pairs.
    """
    plan = first_fit_plan(starts[::2], length, "drop", least=-(-length // PAIRS_IN_ROW))
    middle = starts[1::2][np.searchsorted(starts[:-1:2], plan.begin)]
    begin = np.stack([plan.begin, middle], axis=1)
    end = np.stack([middle, plan.begin + plan.size], axis=1)
    return Plan(begin.ravel(), (end - begin).ravel().astype(np.int32), 2 * plan.first)


def check_long(packing: str, long: str) -> None:
    """Checks that `long` has an effect.

    Raises:
      ValueError: `split` fills rows whatever the documents' lengths are, and pairs are never divided, but `long` asks for something
        else.
    """
    if packing == "split" and long != "split":
        raise ValueError(f"long = {long!r} has no effect with packing = 'split'; set packing to 'first_fit', or leave long out")
    if packing == PAIRS and long != "split":
        raise ValueError(f"long = {long!r} has no effect on preference pairs: longer ones than a row are in none; leave long out")


class PackedRows:
    """The rows of tokenized documents; row i is made when it is asked for.

    Args:
      tokens: the documents.
      length: tokens per row.
      packing: `split` (the stream of documents split every `length` tokens, for texts) or `first_fit` (undivided documents
        and padding, for conversations), or `PAIRS`, for the pairs of `tokens.pairs`.
      long: what `first_fit` does with a document longer than a row: `split`, `truncate` or `drop`, see `first_fit_plan`.

    Raises:
      ValueError: an unknown `packing` or `long`, or a `long` that has no effect.
    """

    def __init__(self, tokens: Tokens, length: int, packing: str = "split", long: str = "split"):
        for name, value, allowed in (("packing", packing, (*PACKINGS, PAIRS)), ("long", long, LONG)):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(allowed)}")
        check_long(packing, long)
        self.tokens, self.length, self.packing, self.long = tokens, length, packing, long
        starts = tokens.starts
        if packing == PAIRS:
            self.plan = pairs_plan(starts, length)
        else:
            self.plan = split_plan(starts, length) if packing == "split" else first_fit_plan(starts, length, long)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        ids, segments = np.zeros(self.length, np.int32), np.zeros(self.length, np.int32)
        weights = np.zeros(self.length, np.float32)
        at, (first, last) = 0, self.plan.first[index : index + 2]
        pieces = zip(self.plan.begin[first:last].tolist(), self.plan.size[first:last].tolist(), strict=True)
        for n, (begin, size) in enumerate(pieces, start=1):
            end, where = at + size, slice(begin, begin + size)
            ids[at:end], segments[at:end] = self.tokens.ids[where], n
            weights[at + 1 : end] = 1 if self.tokens.weights is None else self.tokens.weights[begin + 1 : begin + size]
            at = end
        return {"input_ids": ids, "segment_ids": segments, "loss_weights": weights}

    @property
    def filled(self) -> float:
        """The share of the rows' places that holds tokens rather than padding."""
        return float(self.plan.size.sum()) / max(len(self) * self.length, 1)

    @property
    def unused(self) -> str:
        """A sentence about the tokens that are in no row; empty if there are none."""
        total = int(self.tokens.starts[-1])
        if not (unused := total - int(self.plan.size.sum())):
            return ""
        if self.packing == "split":
            why = f"the last {unused:,}, fewer than a row of {self.length:,}"
        elif self.packing == PAIRS:
            sizes = np.diff(self.tokens.starts[::2])
            longer = int((sizes > self.length).sum())
            why = f"{longer:,} of {len(sizes):,} pairs are longer than a row of {self.length:,}; raise seq_len to learn from them"
        else:
            longer = int((np.diff(self.tokens.starts) > self.length).sum())
            why = f"{longer:,} documents are longer than a row of {self.length:,}, and long is {self.long!r}"
        return f"{unused:,} of {total:,} tokens are in no row: {why}"
