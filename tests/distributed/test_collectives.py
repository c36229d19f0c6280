"""What crosses the wire and what stays in memory, read from compiled programs."""

import json

import pytest

from tests.conftest import run_processes


def measured(what):
    return json.loads(run_processes("tests.distributed.ring_programs", 1, what).splitlines()[-1])


def test_recurrent_mixers_and_windows_send_no_more_for_longer_rows_and_attention_does():
    wire = measured("model_wire")
    for pattern in wire.keys() - {"*"}:
        assert wire[pattern]["128"] == wire[pattern]["256"] > 0, wire
    assert wire["*"]["256"] > 1.2 * wire["*"]["128"]


@pytest.mark.long
def test_ring_attention_s_memory_falls_with_the_devices():
    memory = measured("ring_memory")
    assert memory["16"] < 0.6 * memory["8"]
    assert memory["8 twice"] < 2.2 * memory["8"]


def test_the_next_keys_travel_while_the_kernels_run():
    calls = measured("ring_overlap")
    assert len(calls) >= 2 and min(calls) >= 1, calls  # a loop forward, a loop backward
