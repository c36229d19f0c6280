"""Counts the bytes that collectives of a compiled program send per device, from its optimized HLO; loops are multiplied out."""

from __future__ import annotations

import math
import re

from kernels_pallas.hlo import program_sum

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(-start|-of-scatter)?\((.*)$")
SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
BITS = {"pred": 8, "token": 0}  # of types without a number in their names
GROUPS = (
    (re.compile(r"replica_groups=\{\{([\d,]+)\}"), lambda m: m[1].count(",") + 1),
    (re.compile(r"replica_groups=\[(\d+),(\d+)\]"), lambda m: int(m[2])),
)
MESH_GROUP = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}")
DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
# The TPU compiler writes a reduce-scatter as an all-reduce whose fusion keeps a slice of the result.
SCATTER = re.compile(r"^%all-reduce-scatter[^\n]*\{$.*?^\}", re.MULTILINE | re.DOTALL)


def wire_bytes(hlo: str) -> dict[str, float]:
    """Returns the bytes that one device sends in one run of a program, by kind of collective.

    Collectives are counted as rings: among n devices, all-gather, reduce-scatter and all-to-all send (n - 1) / n of the full
    array, all-reduce twice that, and collective-permute its operand. A collective of several arrays counts all of them.
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
    """Returns the bytes of the array or of all arrays of the tuple that a shape describes."""
    return sum(
        math.prod(int(d) for d in dims.split(",") if d) * (BITS[kind] if kind in BITS else int(bits)) / 8
        for kind, bits, dims in SHAPE.findall(shape)
    )


def _elements(shape: str) -> list[str]:
    """Splits a tuple's shape into those of its elements: `((a, b), c)` -> `(a, b)`, `c`."""
    found, depth = [""], 0
    for char in shape.strip()[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    return found


def _bytes(kind: str, match: re.Match[str], n: int) -> float:
    """Returns the bytes that one device sends in a collective among n.

    The shape of an instruction is that of its results. The shape of an asynchronous start is (operands, results, and then
    flags), each a tuple if there are several; only an all-reduce's start has the results alone.
    """
    shape, start = match[1], match[3] == "-start"
    operands_too = start and kind != "all-reduce"
    if kind == "collective-permute":
        return _size(_elements(shape)[0] if operands_too else shape)
    if kind == "reduce-scatter" and not match[3]:
        size = n * _size(shape)
    elif operands_too:
        size = _size(_elements(shape)[0 if kind == "reduce-scatter" else 1])
    else:
        size = _size(shape)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(line: str, devices: int) -> int:
    """Returns among how many devices a collective runs: all of the program if the line names no groups."""
    for pattern, size in GROUPS:
        if match := pattern.search(line):
            return size(match)
    if match := MESH_GROUP.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    return devices
