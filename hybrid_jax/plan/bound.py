"""Where the time of a compiled step goes at least: matrix products, kernels, and the HBM traffic of everything else."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_jax.hardware import Accelerator
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.operations import Operation
from kernels_pallas.lab.predictions import PREDICTIONS

RECURRENCES = ("gated_delta_rule", "gated_kalmanet", "linear_attention")  # whose kernels' time is not that of products at the peak


def step_seconds(operations: Sequence[Operation], chip: str, hardware: Accelerator, product_flops: float) -> dict[str, float]:
    """Returns the seconds that the parts of a step take at least on a device, one after the other.

    Args:
      operations: of the compiled step.
      chip: a name in `CHIPS`.
      hardware: one device of it.
      product_flops: of a device, matrix products and attention, without the recurrences' kernels.

    Returns:
      "products" at the matrix units' peak; "recurrences", the schedules that the laboratory has recorded for heads of 128 channels
      in bfloat16 (Gated KalmaNet's with the default solver), per token and head, or HBM traffic where it has none for the chip;
      "other kernels" and "other operations", their HBM traffic. Waits, copies that run beside other operations, and collectives
      that nothing hides are not in it.
    """
    clock, recorded = CHIPS[chip].clock, PREDICTIONS[chip]
    seconds: dict[str, float] = {"products": product_flops / hardware.flops}
    seconds |= dict.fromkeys(("recurrences", "other kernels", "other operations"), 0.0)
    for o in operations:
        traffic = o.hbm_bytes / hardware.bandwidth
        if o.kind == "other":
            seconds["other operations"] += traffic
        elif o.kind == "kernel" and (name := next((name for name in RECURRENCES if name in o.name), None)):
            case = f"{name}_step" if "_step" in o.name else name
            cases = (f"{name}.backward", case) if "_backward" in o.name else (case,)
            found = [recorded[c][0] for c in cases if c in recorded]
            bundles = found[0] - sum(found[1:]) if len(found) == len(cases) else 0.0
            seconds["recurrences"] += max(traffic, bundles * o.token_heads / clock)
        elif o.kind == "kernel" and o.token_heads:
            seconds["other kernels"] += traffic
    return seconds
