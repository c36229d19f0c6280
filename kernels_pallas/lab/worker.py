"""The process that compiles: started by `compile.py` with libtpu's options in its environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from kernels_pallas.lab.cases import CASES, Shape, program
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.compile import MARK
from kernels_pallas.lab.estimates import estimated_cycles
from kernels_pallas.lab.schedule import read_schedules


def compile_case(name: str, chip_name: str, mesh, shape, dump: Path, xla: bool) -> dict:
    """What the compiler makes of one case.

    Returns:
      case, chip, shape; `error` if it does not compile, else temporaries (bytes of HBM), hbm_bytes_token_head and
      hbm_cycles_token_head (what the kernels must move, at the chip's bandwidth and clock), around_token_head
      (estimated cycles of the XLA operations around the kernels), xla_token_head and xla_temporaries (the XLA form),
      bundles_token_head (of the whole device), and `kernels`, a dict a kernel.
    """
    chip, case = CHIPS[chip_name], CASES[name]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    token_heads = shape.batch * shape.heads * (1 if case.decode else shape.seq_len)
    result = dict(case=name, chip=chip_name, shape=shape._asdict())

    def compiled(implementation):
        function, arrays = program(case, shape, implementation)
        return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*a, sharding=sharding) for a in arrays)).compile()

    for old in dump.glob("*"):
        old.unlink()
    try:
        with jax.set_mesh(mesh):
            ours = compiled("pallas_tpu")
            schedules = read_schedules(dump, name.split(".")[0].removesuffix("_accurate"))
            theirs = compiled("xla") if xla else None
    except Exception as error:  # the compiler's own words are the result
        return result | dict(error=f"{type(error).__name__}: {error}"[:2000])
    hlo = ours.as_text()
    calls = _pallas_calls(hlo)
    kernels = []
    for schedule in schedules:
        steps, moved = calls[schedule.kernel]
        share = chip.cores if steps > 1 else 1
        kernels.append(
            dict(
                kernel=schedule.kernel,
                grid_steps=steps,
                bundles_grid_step=schedule.bundles,
                bundles_token_head=schedule.bundles * steps / share / token_heads,
                matrix_share=schedule.matrix_share,
                spill_stores=schedule.spill_stores,
                spill_loads=schedule.spill_loads,
                vmem_bytes=schedule.vmem_bytes,
                hbm_bytes_grid_step=moved / steps,
            )
        )
    moved = sum(moved for _, moved in calls.values())
    result |= dict(
        kernels=kernels,
        bundles_token_head=sum(k["bundles_token_head"] for k in kernels),
        hbm_bytes_token_head=moved / token_heads,
        hbm_cycles_token_head=moved / chip.bandwidth * chip.clock / token_heads,
        around_token_head=estimated_cycles(hlo) / token_heads,
        temporaries=ours.memory_analysis().temp_size_in_bytes,
    )
    if theirs is not None:
        result |= dict(
            xla_token_head=estimated_cycles(theirs.as_text()) / token_heads,
            xla_temporaries=theirs.memory_analysis().temp_size_in_bytes,
        )
    return result


def _pallas_calls(hlo: str) -> dict[str, tuple[int, int]]:
    """{kernel: (grid steps, bytes of its arguments and results)}, from the Pallas calls of a compiled program."""
    found = {}
    for call in re.finditer(r'%([\w\-]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', hlo):
        steps = re.compile(r'"grid_steps": ?"(\d+)"').search(hlo, call.end()).group(1)
        moved = re.compile(r'"bytes_accessed":"(\d+)"').search(hlo, call.end()).group(1)
        found[call.group(1)] = (int(steps), int(moved))
    return found


def main(request: str) -> None:
    options = json.loads(request)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[options["chip"]].topology)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    shape = Shape(**options["shape"])
    for name in options["cases"]:
        result = compile_case(name, options["chip"], mesh, shape, Path(options["dump"]), options["xla"])
        print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
