"""What collectives send in steps compiled for eight CPU devices, beside what the formula says; run by test_plan.py.

    python -m tests.plan.compiled_traffic 0 1 PORT CASE

prints one line of JSON: [{kind of collective: bytes}, {kind by formula: bytes}]. CPU programs compute in float32
throughout, so a number of the compute dtype has four bytes here.
"""

import json
import sys

from hybrid_jax.config import MoEConfig, SWAConfig
from hybrid_jax.parallel.mesh import make_mesh, parse_mesh
from hybrid_jax.plan import formula
from hybrid_jax.plan.program import Job, compile_program, make_program
from tests.conftest import tiny_config

SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_heads=8, num_kv_heads=4, head_dim=16, qk_norm=False)
EXPERTS = dict(family="qwen3_moe", moe=MoEConfig(8, 2, 32))
# case -> (mesh, pattern, program, changes to the model); every layer repeats, so that what remat makes again is made again
CASES = {
    "experts": ("expert=2,seq=2,tensor=2", "*-*-*", "train", EXPERTS),
    "aligned": ("fsdp=4,seq=2", "*-SWA-*-SWA", "align", {"swa": SWAConfig(80)}),  # a window that takes the ring
    "distilled": ("fsdp=2,seq=2,tensor=2", "*-*-*", "distill", {}),
}


def main(process, processes, port, case):
    del process, processes, port
    formula.COMPUTE = 4
    mesh, pattern, program, changes = CASES[case]
    sizes = parse_mesh(mesh)
    teacher = tiny_config("*-*-*-*", **{**SIZES, **EXPERTS, "hidden_size": 128}) if program == "distill" else None
    job = Job(tiny_config(pattern, **{**SIZES, **changes}), program, 128, 8, teacher=teacher)
    compiled = compile_program(make_program(job, make_mesh(sizes)))
    print(json.dumps([compiled.wire, formula.traffic(job, sizes).by_kind()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
