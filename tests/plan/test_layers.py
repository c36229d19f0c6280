"""The layer laboratory: operations of a compiled program are read right, and a mixer's costs do not rise."""

import pathlib

import pytest

from hybrid_jax.hardware import TPUS
from hybrid_jax.plan.bound import step_seconds
from hybrid_jax.plan.layer_program import config_of_layer
from hybrid_jax.plan.layers import LayerCost, draw, layer_costs
from hybrid_jax.recurrent_options import GKAConfig
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.operations import Operation, array_bytes, read_operations
from kernels_pallas.lab.predictions import PREDICTIONS

PROGRAM = pathlib.Path(__file__).with_name("operations.hlo")  # written by hand, as the compiler writes


def test_operations_are_read_with_loops_lines_and_traffic():
    prefetch, product, kernel, update = read_operations(PROGRAM.read_text())
    assert (product.kind, product.cycles, product.source) == ("matmul", 300, "layers/gdn.py:7 < layers/gdn.py:5")
    assert product.flops == 3 * 2 * 64 * 32 * 16
    assert product.hbm_bytes == 3 * (64 * 128 * 2 + 64 * 128 * 4), "lanes are padded to 128, and w is in VMEM"
    assert (update.kind, update.cycles) == ("other", 7)
    assert update.hbm_bytes == 2 * 8 * 128 * 4 + 4, "updated in place: the part is read and written"
    assert (kernel.kind, kernel.grid_steps, kernel.token_heads) == ("kernel", 64, 8192)
    assert (prefetch.kind, prefetch.hbm_bytes) == ("prefetch", 8 * 128 * 4)


def test_arrays_have_the_bytes_of_their_tiles():
    assert array_bytes("bf16[3,100]{1,0:T(8,128)(2,1)}") == 8 * 128 * 2
    assert array_bytes("bf16[3,100]{0,1:T(8,128)(2,1)}") == 104 * 128 * 2
    assert array_bytes("(f32[4]{0:T(128)S(1)}, pred[7])") == 7
    assert array_bytes("f32[4]{0:T(128)S(1)}", hbm_only=False) == 16


def test_the_bound_is_products_kernels_and_traffic():
    cost = LayerCost("GDN", 80.0, 100.0, 20.0, 30.0, 10.0, 1.0, {"a": (3.0, 2.0), "b": (1.0, 4.0)}, {})
    assert cost.kernel_bound == 7 and cost.bound == 97


def test_a_step_is_its_products_the_recorded_recurrences_and_traffic(monkeypatch):
    """A second of products; 1e9 tokens and heads of the delta rule, forward and backward; two kernels and an operation of 1 GB."""
    chip, clock = TPUS["v5e"], CHIPS["v5e"].clock

    def kernel(name, token_heads, moved=0.0):
        return Operation(name, "kernel", "", 0, moved, 0, 1, token_heads, "")

    rule = [kernel("jvp_gated_delta_rule_forward_.1", 10**9), kernel("transpose_gated_delta_rule_backward_.2", 10**9)]
    norm, other = kernel("rms_norm_forward.3", 10**9, 1e9), Operation("fusion.4", "other", "", 0, 1e9, 0, 0, 0, "")
    of_library = kernel("splash.5", 0, 1e9)
    seconds = step_seconds([*rule, norm, other, of_library], "v5e", chip, chip.flops)
    assert seconds["products"] == 1
    assert seconds["recurrences"] == pytest.approx(PREDICTIONS["v5e"]["gated_delta_rule.backward"][0] * 1e9 / clock)
    assert seconds["other kernels"] == seconds["other operations"] == 1e9 / chip.bandwidth
    monkeypatch.setitem(PREDICTIONS, "v5e", {})
    assert step_seconds(rule, "v5e", chip, 0.0)["recurrences"] == 0, "no record for the chip: HBM traffic, of which there is none"


def test_a_mixer_may_have_options_of_its_own():
    config = config_of_layer("Qwen/Qwen3-8B", "GKA:solver=cg,num_iter=7")
    assert config.pattern == "GKA" and (config.options(GKAConfig).solver, config.options(GKAConfig).num_iter) == ("cg", 7)
    for wrong, words in (("GKA:sover=cg", "sover"), ("GKA:num_iter=x", "num_iter must be an integer"), ("*:a=1", "no options")):
        with pytest.raises(ValueError, match=words):
            config_of_layer("Qwen/Qwen3-8B", wrong)


CEILINGS = {  # bound, other operations' HBM traffic and estimate: cycles per token and head on v5e, forward and backward
    "GDN": (112, 8, 15),
    "M2": (113, 10, 15),
    "*": (78, 9, 15),
    "GKA": (180, 10, 15),
    "GKA:solver=cg": (165, 10, 15),
    "M3": (111, 5, 12),
}


@pytest.mark.parametrize("symbol", ["GDN", *(pytest.param(x, marks=pytest.mark.long) for x in CEILINGS if x != "GDN")])
def test_what_surrounds_a_mixer_s_kernels_stays_small(symbol, tmp_path):
    pytest.importorskip("libtpu")
    (cost,) = layer_costs("v5e", [symbol], "Qwen/Qwen3-8B", 8192, True)
    bound, traffic, estimate = CEILINGS[symbol]
    assert cost.bound <= bound and cost.glue_hbm <= traffic and cost.glue_estimate <= estimate, cost
    draw({"v5e": [cost]}, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 5000


def test_an_unknown_mixer_is_refused_before_a_process_is_started():
    with pytest.raises(ValueError, match="XYZ"):
        next(layer_costs("v5e", ["XYZ"], "Qwen/Qwen3-8B", 8192, True))
    with pytest.raises(ValueError, match="seq_len"):
        next(layer_costs("v5e", ["GDN"], "Qwen/Qwen3-8B", 0, True))
