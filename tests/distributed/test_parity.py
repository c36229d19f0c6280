"""Loss and every gradient on a mesh are those of one device; eight CPU devices, in one process and in two."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import free_port
from tests.distributed.parity import CASES

TOLERANCE = 1e-5


def run_processes(module, processes, *arguments, devices=8, timeout=900, env=None):
    """Starts `python -m module PROCESS PROCESSES PORT *arguments` in every process; the first one's output."""
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **(env or {})}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(i), str(processes), str(port), *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    outs = []
    try:
        outs = [p.communicate(timeout=timeout) for p in running]
    finally:
        for p in running:
            p.kill()
    for p, (_, errors) in zip(running, outs, strict=True):
        assert p.returncode == 0, errors[-3000:]
    return outs[0][0]


def check(cases, processes):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # large programs of small arrays
    out = run_processes("tests.distributed.parity", processes, *cases, env=quick)
    found = dict(re.findall(r"^(.*): loss (\S+, gradients \S+) ", out, re.M))
    assert set(found) == set(cases), out
    for case, numbers in found.items():
        loss, grads = (float(x) for x in numbers.split(", gradients "))
        assert loss < TOLERANCE and grads < TOLERANCE, (case, out)


ALONE = [c for c in CASES if c.startswith("seq8 ")]
SPLIT = [c for c in CASES if c.endswith("of two processes")]
LONG = [
    *ALONE,
    "fsdp4 tensor2",
    "experts tensor",
    "scanned",
    "a teacher of its own",
    SPLIT[1],
]  # the same code by other meshes, or a mixer at a time
TOGETHER = [c for c in CASES if c not in SPLIT + LONG]


@pytest.mark.parametrize("case", TOGETHER)
def test_a_mesh_of_one_process_gives_one_device_s_gradients(case):
    check([case], 1)


@pytest.mark.parametrize("case", SPLIT[:1])
def test_two_processes_give_one_device_s_gradients(case):
    check([case], 2)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_more_meshes_give_one_device_s_gradients(case):
    check([case], 2 if case in SPLIT else 1)
