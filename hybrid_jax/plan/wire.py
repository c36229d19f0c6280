"""Bytes that collectives of a compiled program move, per device, loops multiplied out; from its optimised HLO."""

from __future__ import annotations

import functools
import re

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all)(-start)?\((.*)$"
)
SHAPE = re.compile(r"(\w+?)(\d*)\[([\d,]*)\]")
CALLS = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)=\{?([^,}\s]+(?:, ?%[\w.\-]+)*)"
)
GROUPS = (
    (re.compile(r"replica_groups=\{\{([\d,]+)\}"), lambda m: m[1].count(",") + 1),
    (re.compile(r"replica_groups=\[(\d+),(\d+)\]"), lambda m: int(m[2])),
)
MESH_GROUP = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


def wire_bytes(hlo: str) -> dict[str, float]:
    """Kind of collective -> bytes one device sends in one run of the program.

    A ring's count: (n - 1) / n of the whole for all-gather, reduce-scatter and all-to-all among n devices, twice that for
    all-reduce, the operand for collective-permute.
    """
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
    def cost(name: str) -> tuple[tuple[str, float], ...]:
        total: dict[str, float] = {}
        for line in bodies.get(name, ()):
            for kind, n in _line(line, bodies, cost):
                total[kind] = total.get(kind, 0.0) + n
        return tuple(total.items())

    return dict(cost(entry))


def trip_count(condition: list[str]) -> int:
    """Of a loop, from the lines of its condition: it counts from 0 to the constant it is compared with; 1 if unclear."""
    limits = [int(m[1]) for line in condition if (m := re.search(r" s32\[\]\S* constant\((\d+)\)", line))]
    return limits[0] if len(limits) == 1 else 1


def _line(line, bodies, cost):
    if " while(" in line:
        body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line).group(1) for part in ("body", "condition"))
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        trips = int(known.group(1)) if known else trip_count(bodies.get(condition, []))
        return [(kind, trips * n) for kind, n in cost(body)]
    if " conditional(" in line:
        names = re.search(r"branch_computations=\{([^}]*)\}", line)
        branches = [cost(n.strip(" %")) for n in names.group(1).split(",")] if names else []
        return max(branches, key=lambda c: sum(n for _, n in c), default=())
    if match := COLLECTIVE.search(line):
        return [(match[2], _bytes(match, line))]
    inner = []
    for match in CALLS.finditer(line):
        for name in match.group(1).split(","):
            inner += cost(name.strip(" %"))
    return inner


def _size(shape: str) -> list[float]:
    sizes = []
    for kind, bits, dims in SHAPE.findall(shape):
        n = 1
        for d in filter(None, dims.split(",")):
            n *= int(d)
        sizes.append(n * (int(bits) / 8 if bits else 1 if kind == "pred" else 4))
    return sizes


def _bytes(match, line: str) -> float:
    result, kind, start, _ = match.groups()
    sizes = [s for s in _size(result) if s > 4]
    # an asynchronous start yields (operands, results, flags); the larger of the two halves is the whole
    whole = max(sizes, default=0) if start else sum(sizes)
    if kind == "collective-permute":
        return whole
    n = _group(line)
    if kind == "reduce-scatter" and not start:
        whole *= n
    return whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(line: str) -> int:
    for pattern, size in GROUPS:
        if match := pattern.search(line):
            return size(match)
    if match := MESH_GROUP.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        n = 1
        for axis in re.findall(r"'(\w+)'", match.group(2)):
            n *= int(sizes[axis])
        return n
    return 1
