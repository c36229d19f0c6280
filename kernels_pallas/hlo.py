"""Sums over the instructions of a compiled program, loops multiplied out, from its optimized HLO.

The body of a loop is listed once. Its trip count is an attribute of the `while` instruction or, where the compiler does
not write one (TPU), the constant that the loop's condition compares the counter with.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
LIMIT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))")
CALLS = re.compile(r"(?:calls|to_apply|called_computations)=\{?([^,}\s]+(?:, ?%[\w.\-]+)*)")


def group_of(pattern: str, text: str) -> str:
    """Returns the first group of a pattern in a text.

    Raises:
      ValueError: the pattern is not there: the compiler writes its programs in another way than this module reads.
    """
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiled program has no {pattern!r} where one was expected: {text[:200]!r}")
    return match.group(1)


def _add(total: dict[str, float], more: dict[str, float]) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, 0) + amount


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation of a program's text, by name, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            current = match.group(1)
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def program_sum(hlo: str, of_line: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """Returns the amounts that one run of a program adds up to, by name.

    Args:
      hlo: the optimized program's text.
      of_line: returns the amounts of an instruction by name; if empty, those of the computations that it calls are added.
        Of a conditional the branch with the largest sum counts.
    """
    bodies, entry = computations(hlo)

    @functools.cache
    def total(name: str) -> dict[str, float]:
        result: dict[str, float] = {}
        for line in bodies.get(name.strip(" %,"), ()):
            _add(result, amounts(line))
        return result

    def amounts(line: str) -> dict[str, float]:
        if " while(" in line:
            body, condition = (group_of(rf"{part}=%?([\w.\-]+)", line) for part in ("body", "condition"))
            trips = trip_count(line, bodies.get(condition, []))
            return {kind: trips * n for kind, n in total(body).items()}
        if own := of_line(line):
            return own
        if " conditional(" in line and (match := BRANCHES.search(line)):
            names = match[1].split(",") if match[1] else match.group(2, 3)
            return max(map(total, names), key=lambda found: sum(found.values()))
        result: dict[str, float] = {}
        for match in CALLS.finditer(line):
            for name in match.group(1).split(","):
                _add(result, total(name))
        return result

    return dict(total(entry))


def trip_count(line: str, condition: list[str]) -> int:
    """Returns the trip count of the loop at `line`, which counts from 0; 1 if its condition does not show it."""
    if known := TRIPS.search(line):
        return int(known.group(1))
    limits = [int(match.group(1)) for text in condition if (match := LIMIT.search(text))]
    return limits[0] if len(limits) == 1 else 1
