"""Bytes that collectives of a compiled program move, per device, loops multiplied out; from its optimised HLO."""

from __future__ import annotations

import re

from kernels_pallas.lab.hlo import program_sum

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all)(-start)?\((.*)$"
)
SHAPE = re.compile(r"(\w+?)(\d*)\[([\d,]*)\]")
GROUPS = (
    (re.compile(r"replica_groups=\{\{([\d,]+)\}"), lambda m: m[1].count(",") + 1),
    (re.compile(r"replica_groups=\[(\d+),(\d+)\]"), lambda m: int(m[2])),
)
MESH_GROUP = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}")
# How the TPU compiler writes a reduce-scatter: an all-reduce of which the same fusion keeps a slice.
SCATTER = re.compile(r"^%all-reduce-scatter[^\n]*\{$.*?^\}", re.MULTILINE | re.DOTALL)


def wire_bytes(hlo: str) -> dict[str, float]:
    """Kind of collective -> bytes one device sends in one run of the program.

    A ring's count: (n - 1) / n of the whole for all-gather, reduce-scatter and all-to-all among n devices, twice that for
    all-reduce, the operand for collective-permute.
    """

    def of_line(line: str) -> dict[str, float]:
        match = COLLECTIVE.search(line)
        return {match[2]: _bytes(match, line)} if match else {}

    return program_sum(SCATTER.sub(lambda m: m[0].replace(" all-reduce(", " reduce-scatter-start("), hlo), of_line)


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
