"""Bytes that collectives of a compiled program move, per device, loops multiplied out; from its optimised HLO."""

from __future__ import annotations

import math
import re

from kernels_pallas.lab.hlo import program_sum

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(-start|-of-scatter)?\((.*)$")
SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
BITS = {"pred": 8, "token": 0}  # of the types whose names do not say
GROUPS = (
    (re.compile(r"replica_groups=\{\{([\d,]+)\}"), lambda m: m[1].count(",") + 1),
    (re.compile(r"replica_groups=\[(\d+),(\d+)\]"), lambda m: int(m[2])),
)
MESH_GROUP = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}")
DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
# How the TPU compiler writes a reduce-scatter: an all-reduce of which the same fusion keeps a slice.
SCATTER = re.compile(r"^%all-reduce-scatter[^\n]*\{$.*?^\}", re.MULTILINE | re.DOTALL)


def wire_bytes(hlo: str) -> dict[str, float]:
    """Kind of collective -> bytes one device sends in one run of the program.

    A ring's count: (n - 1) / n of the whole for all-gather, reduce-scatter and all-to-all among n devices, twice that for
    all-reduce, the operand for collective-permute. A collective of several arrays counts all of them.
    """
    devices = math.prod(map(int, DEVICES.findall(hlo.partition("\n")[0])))

    def of_line(line: str) -> dict[str, float]:
        match = COLLECTIVE.search(line)
        if not match:
            return {}
        kind = "reduce-scatter" if match[3] == "-of-scatter" else match[2]
        return {kind: _bytes(kind, match, _group(line, devices))}

    return program_sum(SCATTER.sub(lambda m: m[0].replace(" all-reduce(", " all-reduce-of-scatter("), hlo), of_line)


def _size(shape: str) -> float:
    """Bytes of an array's shape, or of all arrays of a tuple's."""
    return sum(
        math.prod(int(d) for d in dims.split(",") if d) * (BITS[kind] if kind in BITS else int(bits)) / 8
        for kind, bits, dims in SHAPE.findall(shape)
    )


def _elements(shape: str) -> list[str]:
    """The shapes directly in a tuple's: `((a, b), c)` -> `(a, b)`, `c`."""
    found, depth = [""], 0
    for char in shape.strip()[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    return found


def _bytes(kind: str, match: re.Match, n: int) -> float:
    """Bytes that one device sends in a collective among n.

    What an instruction is said to yield: its results; of an asynchronous start (operands, results, and then flags),
    each a tuple where there are several. An all-reduce's start yields its results alone.
    """
    shape, start = match[1], match[3] == "-start"
    operands_too = start and kind != "all-reduce"
    if kind == "collective-permute":
        return _size(_elements(shape)[0] if operands_too else shape)
    if kind == "reduce-scatter" and not match[3]:
        whole = n * _size(shape)
    elif operands_too:
        whole = _size(_elements(shape)[0 if kind == "reduce-scatter" else 1])
    else:
        whole = _size(shape)
    return whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(line: str, devices: int) -> int:
    """Among how many devices: all of the program where the line names no groups."""
    for pattern, size in GROUPS:
        if match := pattern.search(line):
            return size(match)
    if match := MESH_GROUP.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    return devices
