"""`hybrid-jax check`: its parts find what is wrong, its recorded losses are those of today's code, its page says everything."""

import ast
import json
import subprocess
import sys

import numpy as np
import pytest

from hybrid_jax import check as checks
from hybrid_jax.check import Finding, kernels, run_checks, steps
from hybrid_jax.check.measuring import largest_error
from hybrid_jax.check.page import check_page
from hybrid_jax.commands.main import main
from kernels_pallas.lab.cases import CASES, Shape
from kernels_pallas.lab.predictions import PREDICTIONS
from tests.conftest import ROOT, cpu_devices


def test_a_small_hybrid_of_every_mixer_has_the_recorded_losses():
    _, losses = steps.trained("float32")
    assert losses == pytest.approx(steps.RECORDED, rel=1e-4) and losses[-1] < losses[0] - 0.1


def test_a_part_says_what_does_not_hold_and_an_error_does_not_end_the_check(tmp_path, monkeypatch):
    def breaks(workdir):
        yield Finding("chip", "is cold", False, "80 C")
        raise RuntimeError("no\n  driver")

    monkeypatch.setattr(checks, "PARTS", {"broken": breaks, "machine": checks.PARTS["machine"]})
    found = list(run_checks(["broken", "machine"], tmp_path))
    assert found[0] == Finding("chip", "is cold", False, "80 C", "broken")
    assert found[1] == Finding("", "ends without an error", False, "RuntimeError: no driver", "broken")
    assert {f.part for f in found[2:]} == {"machine"} and all(f.passed is not False for f in found[2:])
    page = check_page(found)
    assert "| broken | chip | is cold | FAILED | 80 C |" in page and "2 of 4 claims hold" in page


def test_the_command_writes_a_page_and_fails_where_a_claim_does_not_hold(tmp_path, monkeypatch, capsys):
    assert main(["check", "--out", str(tmp_path / "good"), "--parts", "machine"]) == 0
    assert "every claim holds" in capsys.readouterr().out
    kept = json.loads((tmp_path / "good/check.json").read_text())
    assert {f["part"] for f in kept} == {"machine"} and "versions" in (tmp_path / "good/check.md").read_text()
    monkeypatch.setitem(checks.PARTS, "machine", lambda workdir: iter([Finding("a", "is b", False, "c")]))
    assert main(["check", "--out", str(tmp_path / "bad"), "--parts", "machine"]) == 1
    assert "1 claims do not hold (machine: a); see" in capsys.readouterr().err and (tmp_path / "bad/check.md").exists()
    assert main(["check", "--out", str(tmp_path / "none"), "--parts", "engine"]) == 1
    assert "--parts" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_an_operation_that_is_wrong_is_found():
    name, shape = "linear_attention", Shape(1, 20, 2, 8, 8, "float32")
    assert kernels._error(name, CASES[name], shape).passed
    broken = CASES[name]._replace(
        run=lambda q, k, v, g, *, implementation, **o: CASES[name].run(
            q, k, v, g if implementation == "reference" else 0 * g, implementation=implementation, **o
        )
    )
    assert kernels._error(name, broken, shape).passed is False


def test_what_cannot_be_compared_is_no_agreement():
    one, nan = np.ones(3), np.full(3, np.nan)
    assert largest_error([one], [one]) == 0 and largest_error([2 * one], [one]) == 1
    assert largest_error([one], [nan]) == largest_error([nan], [one]) == largest_error(np.ones(1), one) == np.inf


def test_collectives_that_deliver_to_the_wrong_place_are_found():
    code = """
import jax, pathlib
from hybrid_jax.check.collectives import check
print({f.subject: f.passed for f in check(pathlib.Path('.')) if f.claim == 'is right'})
a2a, gather = jax.lax.all_to_all, jax.lax.all_gather
jax.lax.all_to_all = lambda x, *a, **k: a2a(x[::-1], *a, **k)[::-1]
jax.lax.all_gather = lambda x, *a, **k: gather(x, *a, **k)[::-1]
print({f.subject: f.passed for f in check(pathlib.Path('.')) if f.claim == 'is right'})
"""
    out = subprocess.run([sys.executable, "-c", code], env=cpu_devices(4), capture_output=True, text=True, check=True).stdout
    right, wrong = map(ast.literal_eval, out.splitlines()[-2:])
    assert right == dict.fromkeys(("all-reduce", "all-gather", "permute", "all-to-all"), True)
    assert wrong == {**right, "all-gather": False, "all-to-all": False}


def test_predictions_are_those_of_the_laboratory_s_record():
    found = {}
    for line in (ROOT / "tests/benchmarks/kernels_tpu.txt").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        if len(cells) > 5 and cells[0] in CASES:
            found.setdefault(cells[1], {})[cells[0]] = float(cells[2]), float(cells[3])
    assert found == PREDICTIONS and set(PREDICTIONS["v5e"]) == set(CASES)
