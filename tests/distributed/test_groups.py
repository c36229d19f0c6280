"""Recurrences of grouped heads on meshes of eight devices."""

import json

from tests.conftest import run_processes


def test_grouped_heads_on_a_mesh_are_those_of_one_device_and_are_sharded_where_the_mesh_divides_them():
    """Eight heads, four of k and two of v: with `tensor` = 4 those of v are repeated before, and with 2 nothing is."""
    found = json.loads(run_processes("tests.distributed.group_programs", 1).splitlines()[-1])
    assert len(found) == 7
    for case, (error, of_k, of_v) in found.items():
        assert error < 2e-5, (case, error)
        assert (of_k, of_v) == ((1, 2) if "'tensor': 4" in case else (2, 1)), case


def test_a_mesh_that_does_not_divide_the_heads_of_keys_computes_and_generates_what_one_device_does():
    found = json.loads(run_processes("tests.distributed.head_programs", 1).splitlines()[-1])
    assert all(error < 1e-5 for error in found["errors"].values()), found
    for symbol, (alone, on_mesh) in found["tokens"].items():
        assert alone == on_mesh, symbol
