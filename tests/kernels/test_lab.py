"""What the real TPU compiler makes of every kernel, on four chips that are not here: it compiles, and is no worse than recorded.

The numbers are exact and repeatable for a version of libtpu; `python -m tests.kernels.test_lab [CASE ...]` records those of the
installed version beside those of others. A version without a record is compared with the newest one that has one.
"""

import importlib.metadata
import json
import math
import pathlib
import sys

import pytest

from kernels_pallas.lab import CASES, CHIPS, compile_cases
from kernels_pallas.lab.estimates import estimated_cycles
from kernels_pallas.lab.lab_report import cells, draw, write_json
from kernels_pallas.lab.schedule import read_schedules

RECORD = pathlib.Path(__file__).parents[1] / "golden" / "lab.json"
SHAPE = dict(seq_len=1024, heads=8)
ROOM, ROOM_OF_ANOTHER_LIBTPU = 1.02, 1.1
# per token and head at 8192 tokens, 32 heads, 128 dims, bf16: what this package promises (v5e, v5p, v6e)
PROMISES = {
    "gated_delta_rule": (12, 6, 8),
    "gated_delta_rule.backward": (34, 17, 23),
    "linear_attention": (4, 3, 3),
    "gated_kalmanet": (50, 25, 50),
    "gated_kalmanet_accurate": (110, 55, 110),
}


# the gradients of other forms of a kernel have all of them: of groups, of Mamba-2's scalars and of Mamba-3, whose MIMO is SISO's
FORMS = ("grouped", "mamba2", "mamba3")
CHECKED = [
    name
    for name in CASES
    if name not in ("gated_kalmanet_accurate.backward", "gated_kalmanet_accurate_cg.backward", "mamba3_mimo.backward")
    and (name.endswith(".backward") or not any(form in name for form in FORMS))
]
ODD = [
    dict(key_dim=64, value_dim=128, heads=14),
    dict(key_dim=96, value_dim=160, heads=5, seq_len=300, batch=2),
    dict(key_dim=256, value_dim=256, heads=4, dtype="float32"),
    dict(packed=True, heads=6),
]


def checked(chip):
    """The cases that are compiled for a chip: the compiler for tpu7x takes up to ten minutes for a form of Gated KalmaNet."""
    return [name for name in CHECKED if chip != "tpu7x" or not name.startswith("gated_kalmanet")]


def results(chip, cases):
    return {r["case"]: r for r in compile_cases(chip, cases, SHAPE, xla=False)}


def ceiling(chip, kernel):
    """Returns how many bundles a grid step of a kernel may have with the installed libtpu."""
    records, version = json.loads(RECORD.read_text()), importlib.metadata.version("libtpu")
    if kernel in records.get(version, {}).get(chip, {}):
        return ROOM * records[version][chip][kernel]
    return ROOM_OF_ANOTHER_LIBTPU * [found[chip][kernel] for found in records.values() if kernel in found[chip]][-1]


# A chip takes half a minute to a minute and a half.
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.long] * (chip != "v5e")) for chip in CHIPS])
def test_every_kernel_compiles_and_its_bundles_stay_under_the_record(chip):
    pytest.importorskip("libtpu")
    for name, result in results(chip, checked(chip)).items():
        assert "error" not in result, result
        for kernel in result["kernels"]:
            assert kernel["bundles_grid_step"] <= ceiling(chip, f"{name}/{kernel['kernel']}"), (name, kernel)
        if name in PROMISES and chip != "tpu7x":
            assert result["bundles_token_head"] <= PROMISES[name][list(CHIPS).index(chip)]


@pytest.mark.long
@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_kernels_compile_at_odd_shapes(chip, shape):
    pytest.importorskip("libtpu")
    names = [n for n in CASES if n.endswith(".backward")]
    for result in compile_cases(chip, names, dict(seq_len=512) | shape, xla=False):
        assert "error" not in result, result


LISTING = """\
= control target key start
LB: loop body
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %v1 = vld [vmem:[#allocation2]] }
   0x2 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x3   : >> { %p2 = scmp.ge.s32.totalorder %s2, 5 /* loop exit test */ }
   0x4 PF: > { %v3 = vst %v2 }
   0x5   : > { %p1 = scmp.ge.s32.totalorder %s1, 18 /* loop exit test */ }
   0x6   :  { %s9 = sst 0 }
"""
UTILIZATION = """\
== CAPACTIY:
MXU, VALU, VLOAD:FILL, VSTORE:SPILL
    4     4     3     1
== UTILIZATION:
0 0 0 0
0 0 1 0
4 1 0 0
0 1 0 0
0 0 0 1
0 0 0 0
0 0 0 0
"""


def test_a_schedule_counts_the_grid_step_with_its_inner_loops_multiplied_out(tmp_path):
    (tmp_path / "7-kern.1-02-original.txt").write_text("#allocation1 [shape = 'f32[8]', space=vmem, size = 0x1000, scoped]")
    (tmp_path / "7-kern.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "7-kern.1-72-final_bundles.txt").write_text(LISTING)
    (schedule,) = read_schedules(tmp_path, "kern")
    assert schedule.kernel == "kern"
    assert schedule.bundles == 3 + 5 * 2
    assert schedule.slots == {"MXU": (20, 4), "VALU": (10, 4)}
    assert math.isclose(schedule.matrix_share, 20 / (4 * 13))
    assert (schedule.spill_stores, schedule.spill_loads, schedule.vmem_bytes) == (1, 1, 4096)


HLO = """\
HloModule jit_f

%body (arg: f32[8]) -> f32[8] {
  ROOT %fusion.2 = f32[8] fusion(%arg), kind=kLoop, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %fusion.1 = f32[8] fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"7"}
  %garbage = f32[8] fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %while = f32[8] while(%fusion.1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"64"}}
}
"""


CONDITION = """\
%cond (arg: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(37)
  ROOT %less = pred[] compare(%arg, %limit), direction=LT
}
"""


def test_estimates_multiply_loops_out_and_leave_out_garbage():
    assert estimated_cycles(HLO) == 7 + 64 * 100


def test_a_loop_whose_trips_are_not_written_down_runs_as_often_as_its_condition_says():
    silent = HLO.replace(', backend_config={"known_trip_count":{"n":"64"}}', "")
    assert estimated_cycles(silent.replace("ENTRY", CONDITION + "\nENTRY")) == 7 + 37 * 100
    assert estimated_cycles(silent) == 7 + 100


def test_the_report_draws_what_it_was_given(tmp_path):
    kernel = dict(bundles_token_head=2.5, bundles_grid_step=2560, matrix_share=0.5, spill_stores=3, vmem_bytes=2**20)
    result = dict(case="a", chip="v5e", kernels=[kernel], bundles_token_head=2.5, hbm_cycles_token_head=1.9, around_token_head=0.1)
    result |= dict(temporaries=2**21, xla_token_head=37.0, xla_temporaries=2**22)
    failed = dict(case="b", chip="v5e", error="Mosaic: no")
    assert cells(result)[2:7] == ("2.50", "1.90", "0.10", "37.0", "50 %")
    assert cells(failed)[2] == "does not compile"
    write_json([result, failed], tmp_path / "lab.json")
    assert json.loads((tmp_path / "lab.json").read_text())[0]["case"] == "a"
    draw([result, failed], tmp_path / "lab.png")
    assert (tmp_path / "lab.png").stat().st_size > 5000


def test_an_unknown_chip_or_case_is_refused(capsys):
    from kernels_pallas.lab.__main__ import choose

    with pytest.raises(ValueError, match="unknown chip 'v9'; have v5e"):
        list(compile_cases("v9", ["gated_delta_rule"]))
    with pytest.raises(ValueError, match="no case 'attention'; have linear_attention"):
        choose(["attention"])
    assert choose(["short_conv"]) == ["short_conv", "short_conv.backward"]


if __name__ == "__main__":
    records, version = json.loads(RECORD.read_text()), importlib.metadata.version("libtpu")
    found = records.setdefault(version, {})
    for chip in CHIPS:
        kernels = [
            (name, kernel) for name, result in results(chip, sys.argv[1:] or checked(chip)).items() for kernel in result["kernels"]
        ]
        found[chip] = found.get(chip, {}) | {f"{name}/{kernel['kernel']}": 0 for name, kernel in kernels}
        for name, kernel in kernels:  # of several calls of one kernel the longest
            key = f"{name}/{kernel['kernel']}"
            found[chip][key] = max(found[chip][key], kernel["bundles_grid_step"])
    in_order = dict(sorted(records.items(), key=lambda item: [int(n) for n in item[0].split(".")]))
    RECORD.write_text(json.dumps(in_order, indent=1) + "\n")
