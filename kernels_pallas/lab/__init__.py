"""The TPU laboratory: what the TPU's own compiler makes of a kernel, on any machine (`python -m kernels_pallas.lab`).

Nothing here runs on a TPU. libtpu compiles ahead of time for a chip that the machine does not have and writes the schedule
to files; `schedule.py` counts its bundles (one per cycle, plus waits for memory), `estimates.py` adds up the compiler's own
cycle estimates of an XLA program.
"""

from kernels_pallas.lab.cases import CASES, Case, Shape
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.compile import compile_cases

__all__ = ["CASES", "CHIPS", "Case", "Shape", "compile_cases"]
