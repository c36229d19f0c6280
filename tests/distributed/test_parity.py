"""Loss and every gradient on a mesh are those of one device; eight CPU devices, in one process and in two."""

import re

import pytest

from tests.conftest import run_processes
from tests.distributed.parity import CASES

TOLERANCE = 1e-5


def check(cases, processes):
    out = run_processes("tests.distributed.parity", processes, *cases)
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
    "seq8, chunks of one token",
    "data2 seq4",
    "experts tensor",
    "experts of weighted inputs, chunks",
    "biases of parts of a map",
    "one group of B and C",
    "expanded heads",
    "without MLPs",
    "matrices",
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


def found(pattern, text):
    """The groups of what a pattern finds."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match.groups()


def test_two_processes_measure_and_continue_as_one_device_does():
    """Tokens' losses, roles of mixing matrices, continuations, and log-probabilities (of about 10 nats) after shared prefixes."""
    said = run_processes("tests.distributed.scores", 2)
    losses, right = found(r"losses (\S+), right (\S+)", said)
    (roles,) = found(r"roles (\S+)", said)
    assert float(losses) < TOLERANCE and float(right) == 1 and float(roles) < TOLERANCE
    continued, error, greedy = found(r"continued (.*), scored (\S+) (\S+)", said)
    assert (continued, greedy) == ("[True, True]", "True") and float(error) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_more_meshes_give_one_device_s_gradients(case):
    check([case], 2 if case in SPLIT else 1)
