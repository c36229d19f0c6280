"""The TPU compiler's own cycle estimates of an XLA program, with loops multiplied out.

Optimised HLO carries `"estimated_cycles":"N"` at every fusion; the body of a loop is listed once, whatever its
trip count, which stands at the `while`. A Pallas call has no estimate and counts as nothing.
"""

from __future__ import annotations

import functools
import re

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
GARBAGE = 2**60  # some fusions of tpu7x read as numbers near 2^63


def estimated_cycles(hlo: str) -> int:
    """Cycles of one run of the program."""
    bodies: dict[str, list[str]] = {}
    entry = current = None
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            current = match.group(1)
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current is not None:
            bodies[current].append(line)

    @functools.cache
    def cost(name: str) -> int:
        total = 0
        for line in bodies.get(name, ()):
            if " while(" in line:
                trips = TRIPS.search(line)
                body = re.search(r"body=%?([\w.\-]+)", line).group(1)
                total += (int(trips.group(1)) if trips else 1) * cost(body)
            elif match := re.search(r" (?:call|conditional)\(.*(?:to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                total += cost(match.group(1))
            elif match := CYCLES.search(line):
                total += int(match.group(1)) if int(match.group(1)) < GARBAGE else 0
        return total

    return cost(entry)
