"""Which requests of log-probabilities share a forward pass, and which share the computation of a common prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

SHORTEST_PREFIX = 32  # tokens; sharing fewer is not worth a program that continues a state
LONGEST_SUFFIX = 512  # tokens after a shared prefix; the scores of attention to a cache are held for all of them at once


@dataclasses.dataclass(frozen=True)
class Row:
    """The tokens of one forward pass, and the requests that it answers.

    Args:
      ids: at least one token.
      answers: (number of the request, targets) each; the targets are what the last `len(targets)` tokens are to predict.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def first(self) -> int:
        """The first position whose prediction is needed."""
        return len(self.ids) - max(len(targets) for _, targets in self.answers)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of which the first `shared` tokens are equal and are computed once; 0: every row is computed alone."""

    shared: int
    rows: tuple[Row, ...]


def make_rows(queries: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Row]:
    """Returns the forward passes that answer (context, continuation) pairs of token ids.

    The input of a pair is everything but its last token, truncated on the left to `max_length` tokens. Pairs with equal inputs
    share a row: choices of one token after the same context need one forward pass.
    """
    found: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for n, (context, continuation) in enumerate(queries):
        ids = (*context, *continuation)[-(max_length + 1) :][:-1]
        found.setdefault(ids, []).append((n, tuple(continuation)))
    return [Row(ids, tuple(answers)) for ids, answers in found.items()]


def _common(a: Row, b: Row) -> int:
    """Returns how many tokens two rows can share: equal ones, before the first prediction that either needs."""
    n = min(a.first, b.first)
    differ = np.flatnonzero(np.asarray(a.ids[:n]) != np.asarray(b.ids[:n]))
    return int(differ[0]) if len(differ) else n


@dataclasses.dataclass(frozen=True)
class _Part:
    """Consecutive rows in lexicographic order: the cheapest groups of them, and how many tokens these compute."""

    cost: int
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]


def _join(depth: int, parts: Sequence[_Part]) -> _Part:
    """Returns the parts; those that are cheaper after a common prefix of `depth` tokens become one group that shares it."""

    def after_prefix(part: _Part) -> int:
        return sum(len(row.ids) - depth for row in part.rows)

    def fits(part: _Part) -> bool:
        return after_prefix(part) < part.cost and max(len(row.ids) for row in part.rows) - depth <= LONGEST_SUFFIX

    joined = [part for part in parts if depth >= SHORTEST_PREFIX and fits(part)]
    saved = sum(part.cost - after_prefix(part) for part in joined) - depth
    if saved <= 0:
        joined, saved = [], 0
    groups = [group for part in parts if not (joined and fits(part)) for group in part.groups]
    if joined:
        groups.append(Group(depth, tuple(row for part in joined for row in part.rows)))
    return _Part(sum(part.cost for part in parts) - saved, tuple(groups), tuple(row for part in parts for row in part.rows))


def group_by_prefix(rows: Sequence[Row]) -> list[Group]:
    """Groups rows so that the fewest tokens are computed, where a group computes its longest common prefix once.

    At a node of the tree of all common prefixes, those children become a group that are cheaper so than as the groups they have.
    For four choices per question with many examples in front, the groups are the questions, or all of them if the examples are
    the same.
    """
    if not rows:
        return []
    rows = sorted(rows, key=lambda row: row.ids)
    depths = [_common(a, b) for a, b in zip(rows, rows[1:], strict=False)]  # of each row with the next one
    stack: list[tuple[int, list[_Part]]] = [(0, [])]  # open nodes (depth, children), deeper and deeper
    for row, depth in zip(rows, [*depths, 0], strict=True):
        part = _Part(len(row.ids), (Group(0, (row,)),), (row,))
        while stack[-1][0] > depth:
            node, children = stack.pop()
            part = _join(node, [*children, part])
        if stack[-1][0] < depth:
            stack.append((depth, []))
        stack[-1][1].append(part)
    return [group for part in stack[0][1] for group in part.groups]
