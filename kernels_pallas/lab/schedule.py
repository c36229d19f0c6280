"""Reads a kernel's static schedule from what libtpu dumps: bundles of a grid step, slots used, spills, VMEM.

A dumped kernel has two files that correspond line by line: the bundles (one per address, with `LB:` at a
loop's body, `>` signs for its depth, and the loops' exit tests) and the slots each bundle uses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kernels_pallas.hlo import group_of

BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(LB)?[A-Z]*:?\s*:?\s*(>*)\s*\{")
EXIT_TEST = re.compile(r"scmp\.ge\.s32\.totalorder[^,]*, (\d+) /\* loop exit test \*/")


class Schedule(NamedTuple):
    """One kernel's bundles per grid step (inner loops multiplied out), slots {unit: (used, capacity per bundle)}, and spills.

    `instruction` is the name of its call in the program, `kernel` the same without its number.
    """

    kernel: str
    instruction: str
    bundles: int
    slots: dict[str, tuple[int, int]]
    spill_stores: int
    spill_loads: int
    vmem_bytes: int

    @property
    def matrix_share(self) -> float:
        """The share of the matrix units' slots that are used."""
        used, capacity = next(v for unit, v in self.slots.items() if unit.startswith(("MXU", "MAT")))
        return used / (capacity * self.bundles)


def _weights(lines: list[str]) -> list[int]:
    """Returns how often each bundle runs in one grid step: 0 outside the grid's loop, the trip count in an inner loop.

    Raises:
      ValueError: the grid's loop has a loop inside an inner loop, which no kernel here has.
    """
    trips = [int(n) for line in lines for n in EXIT_TEST.findall(line)]
    inner, weights, depths = -1, [], []
    for line in lines:
        match = BUNDLE.match(line)
        if not match:
            continue
        depth = len(match.group(3))
        if depth > 2:
            raise ValueError("a loop inside an inner loop: its trips cannot be known from the listing")
        if match.group(2) and depth == 2:
            inner += 1
        depths.append(depth)
        weights.append(trips[inner] if depth == 2 else min(depth, 1))
    return weights if any(depths) else [1] * len(weights)


def read_schedules(folder: Path, prefix: str) -> list[Schedule]:
    """Returns the schedules of every kernel in the dump whose name contains `prefix`, in the order compiled."""
    found = []
    for utilization in sorted(folder.glob(f"*{prefix}*-final_hlo-static-per-bundle-utilization.txt")):
        stem = group_of(r"^(.*?)-\d+-final_hlo", str(utilization))
        listing = next(f for f in folder.glob(f"{Path(stem).name}-*-final_bundles.txt") if "schedule-analysis" not in f.name)
        original = next(folder.glob(f"{Path(stem).name}-*-original.txt")).read_text(errors="replace")
        lines = listing.read_text(errors="replace").splitlines()
        rows = utilization.read_text().splitlines()
        units, capacity = [u.strip() for u in rows[1].split(",")], [int(n) for n in rows[2].split()]
        table = [[int(n) for n in row.split()] for row in rows[4:] if row.strip()]
        weights = _weights(lines)
        used = {u: sum(w * row[i] for w, row in zip(weights, table, strict=False)) for i, u in enumerate(units)}
        instruction = re.sub(r"^\d+-", "", Path(stem).name)
        found.append(
            Schedule(
                kernel=instruction.split(".")[0],
                instruction=instruction,
                bundles=sum(weights),
                slots={u: (used[u], c) for u, c in zip(units, capacity, strict=True) if ":" not in u},
                spill_stores=used.get("VSTORE:SPILL", 0),
                spill_loads=used.get("VLOAD:FILL", 0),
                vmem_bytes=sum(int(n, 16) for n in re.findall(r"space=vmem, size = 0x([0-9a-f]+)", original)),
            )
        )
    return found
