"""The benchmark times what it says it does."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from kernels_pallas.bench import main, our_call
from kernels_pallas.lab.cases import CASES, Shape, random_arrays

shape = Shape(1, 40, 4, 8, 8, "float32")
for name in ("gated_delta_rule", "gated_delta_rule.backward"):
    arrays = random_arrays(CASES[name], shape)
    one, two = (jax.tree.leaves(our_call(name, shape, "xla", arrays, devices)()) for devices in (1, 2))
    assert len(one) == len(two) and len(two[0].sharding.device_set) == 2
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(one, two)), name
sys.exit(main(sys.argv[1:]))
"""


def bench(*arguments):
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)


def test_each_device_has_its_heads_and_a_line_has_both_times_and_their_ratio():
    pytest.importorskip("torch")
    done = bench("--rounds", "1", "--heads", "2", "--dim", "8", "--seq-len", "32", "--devices", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [line[:5] for line in lines] == [
        [name, "1", "32", "2", "8"] for name in ("gated_delta_rule", "gated_delta_rule.backward")
    ]
    for *_, ours, peer, ratio in lines:
        assert abs(float(peer) / float(ours) - float(ratio)) < 0.05 * float(ratio) + 0.05


def test_a_peer_that_is_not_here_is_named():
    done = bench("--peer", "fla")
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr
