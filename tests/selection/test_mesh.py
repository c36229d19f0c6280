"""Scorers on a mesh of eight CPU devices: rows over `data`, tokens over `seq`, heads over `tensor`."""

import subprocess
import sys

from tests.conftest import cpu_devices
from tests.selection.on_mesh import NAMES


def test_scores_on_a_mesh_are_those_of_one_device():
    command = [sys.executable, "-m", "tests.selection.on_mesh"]
    done = subprocess.run(command, env=cpu_devices(8), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(": ") for line in done.stdout.splitlines()]
    found = {name: [float(x) for x in numbers.split()] for name, _, numbers in lines if name in NAMES}
    assert found.keys() == set(NAMES)
    assert all(error < 1e-3 and spread > 1e-3 for error, spread in found.values()), found
