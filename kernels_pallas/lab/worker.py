"""The process that compiles: started by `compile.py` with libtpu's options in its environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from kernels_pallas.hlo import group_of
from kernels_pallas.lab.cases import CASES, Shape, program
from kernels_pallas.lab.chips import CHIPS, Chip
from kernels_pallas.lab.compile import MARK
from kernels_pallas.lab.estimates import estimated_cycles
from kernels_pallas.lab.schedule import read_schedules


def compile_form(name: str, mesh: jax.sharding.Mesh, shape: Shape, implementation: str) -> jax.stages.Compiled:
    """Returns the compiled program of one implementation of a case."""
    function, arrays = program(CASES[name], shape, implementation)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*a, sharding=sharding) for a in arrays)).compile()


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of HBM that a compiled program needs besides its arguments and results."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("the compiler does not say how much memory the program needs")
    return analysis.temp_size_in_bytes


def token_heads(name: str, shape: Shape) -> int:
    """Returns tokens times heads of a case: what its costs are divided by."""
    return shape.batch * shape.heads * (1 if CASES[name].decode else shape.seq_len)


def compile_kernels(name: str, chip: Chip, mesh: jax.sharding.Mesh, shape: Shape, dump: Path) -> dict:
    """Compiles a case's kernels and reads what they cost.

    Returns:
      temporaries (bytes of HBM), hbm_bytes_token_head and hbm_cycles_token_head (what the kernels must move, at the
      chip's bandwidth and clock), around_token_head (estimated cycles of the XLA operations around the kernels),
      bundles_token_head (for all cores of the device), and `kernels`, one dict per kernel.
    """
    for old in dump.glob("*"):
        old.unlink()
    compiled = compile_form(name, mesh, shape, "pallas_tpu")
    hlo, n = compiled.as_text() or "", token_heads(name, shape)
    calls = _pallas_calls(hlo)
    moved_by_all = sum(moved for found in calls.values() for _, moved in found)
    kernels = []
    schedules = read_schedules(dump, CASES[name].kernel or name.split(".")[0])
    names = [s.kernel for s in schedules]
    repeated = {kernel: len(calls[kernel]) // names.count(kernel) for kernel in names}
    for schedule in [s for s in schedules for _ in range(repeated[s.kernel])]:  # the compiler compiles equal calls once
        steps, moved = calls[schedule.kernel].pop(0)
        share = chip.cores if steps > 1 else 1
        kernels.append(
            dict(
                kernel=schedule.kernel,
                grid_steps=steps,
                bundles_grid_step=schedule.bundles,
                bundles_token_head=schedule.bundles * steps / share / n,
                matrix_share=schedule.matrix_share,
                spill_stores=schedule.spill_stores,
                spill_loads=schedule.spill_loads,
                vmem_bytes=schedule.vmem_bytes,
                hbm_bytes_grid_step=moved / steps,
            )
        )
    return dict(
        kernels=kernels,
        bundles_token_head=sum(k["bundles_token_head"] for k in kernels),
        hbm_bytes_token_head=moved_by_all / n,
        hbm_cycles_token_head=moved_by_all / chip.bandwidth * chip.clock / n,
        around_token_head=estimated_cycles(hlo) / n,
        temporaries=temporaries(compiled),
    )


def compile_xla(name: str, mesh: jax.sharding.Mesh, shape: Shape) -> dict:
    """Returns the compiler's estimate of the XLA form (`xla_token_head`, cycles), and `xla_temporaries` (bytes)."""
    compiled = compile_form(name, mesh, shape, "xla")
    return dict(
        xla_token_head=estimated_cycles(compiled.as_text() or "") / token_heads(name, shape),
        xla_temporaries=temporaries(compiled),
    )


def _pallas_calls(hlo: str) -> dict[str, list[tuple[int, int]]]:
    """Returns {kernel: [(grid steps, bytes of its arguments and results) of each call]}, from the compiled program."""
    found = {}
    for call in re.finditer(r'%([\w\-]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', hlo):
        steps = group_of(r'"grid_steps": ?"(\d+)"', hlo[call.end() :])
        moved = group_of(r'"bytes_accessed":"(\d+)"', hlo[call.end() :])
        found.setdefault(call.group(1), []).append((int(steps), int(moved)))
    return found


def main(request: str) -> None:
    """Prints one marked line of JSON per case; a case that does not compile has `error`, the compiler's message."""
    options = json.loads(request)
    chip = CHIPS[options["chip"]]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    shape = Shape(**options["shape"])
    for name in options["cases"]:
        try:
            if options["dump"]:
                result = compile_kernels(name, chip, mesh, shape, Path(options["dump"]))
            else:
                result = compile_xla(name, mesh, shape)
        except Exception as error:
            result = dict(error=f"{type(error).__name__}: {error}"[:2000])
        print(MARK + json.dumps(dict(case=name, chip=options["chip"], shape=shape._asdict()) | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
