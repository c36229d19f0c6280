"""The TPU laboratory: what the TPU's own compiler makes of a kernel, on any machine (`python -m kernels_pallas.lab`).

Nothing here runs on a TPU. libtpu compiles ahead of time for a chip that is not there and writes down the
schedule; `schedule.py` counts its bundles (one a cycle, waits for memory come on top), `estimates.py` adds up
the compiler's own cycle estimates of an XLA program.
"""

from kernels_pallas.lab.cases import CASES, Case, Shape
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.compile import compile_cases

__all__ = ["CASES", "CHIPS", "Case", "Shape", "compile_cases"]
