"""The TPU compiler's own cycle estimates of an XLA program, with loops multiplied out.

Optimized HLO carries `"estimated_cycles":"N"` at every fusion. A Pallas call has no estimate and counts as 0.
"""

from __future__ import annotations

import re

from kernels_pallas.hlo import program_sum

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
GARBAGE = 2**60  # some fusions of tpu7x read as numbers near 2^63


def cycles_of(line: str) -> int:
    """Returns the estimate of one instruction, 0 if it has none."""
    match = CYCLES.search(line)
    cycles = int(match.group(1)) if match else 0
    return cycles if cycles < GARBAGE else 0


def estimated_cycles(hlo: str) -> int:
    """Returns the cycles of one run of the program."""

    def of_line(line: str) -> dict[str, float]:
        if CYCLES.search(line) is None or " call(" in line or " conditional(" in line:
            return {}
        return {"cycles": cycles_of(line)}

    return int(program_sum(hlo, of_line).get("cycles", 0))
