"""The planner: counts that are known, slices that are not there, answers and refusals."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from hybrid_jax.config import MoEConfig, SWAConfig
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.families.public import PUBLIC
from hybrid_jax.flops import count_flops
from hybrid_jax.hardware import accelerator, device_count
from hybrid_jax.layers.mamba2 import Mamba2, Mamba2State
from hybrid_jax.memory import state_bytes
from hybrid_jax.parallel import attention_block
from hybrid_jax.parallel.mesh import abstract_mesh, make_mesh
from hybrid_jax.plan import planner
from hybrid_jax.plan.formula import flops_by_formula, link_speed, traffic
from hybrid_jax.plan.plan_report import plan_json, plan_rows
from hybrid_jax.plan.planner import make_plan, meshes, spread_pattern
from hybrid_jax.plan.program import (
    Compiled,
    Job,
    Program,
    abstract_parameters,
    compile_program,
    decoding_program,
    make_program,
)
from hybrid_jax.plan.wire import wire_bytes
from tests.conftest import run_processes, tiny_config

HLO = """
%all-reduce-scatter.1 (input: f32[16]) -> f32[4] {
  %all-reduce.7 = f32[16]{0} all-reduce(%input), replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[4]{0} dynamic-slice(%all-reduce.7, %i), dynamic_slice_sizes={4}
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ag = bf16[4,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %cp = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[], bf16[4,8]) while(%t), condition=%condition, body=%body
  %ar = f32[16]{0} all-reduce(%z), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %rs = f32[4]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_bytes_on_the_wire_are_read_from_hlo_with_loops_multiplied_out():
    want = {"all-gather": 6 * 48, "collective-permute": 6 * 64, "all-reduce": 2 * 48, "reduce-scatter": 48}
    assert wire_bytes(HLO) == want


ASYNCHRONOUS = {
    # two arrays gathered by one instruction, 1024 -> 4096 elements each: three quarters of 2 x 8192 bytes
    "((bf16[1024]{0}, bf16[1024]{0}), (bf16[4096]{0}, bf16[4096]{0})) all-gather-start(%a, %b)": 12288,
    "(bf16[1024]{0}, bf16[4096]{0}) all-gather-start(%a)": 6144,
    "(f32[4096]{0:T(1024)}, f32[4096]{0:T(1024)}) all-reduce-start(%a, %b)": 2 * 2 * 12288,
    "f32[4096]{0} all-reduce-start(%a)": 2 * 12288,
    "(f32[4096]{0}, f32[4096]{0}) all-reduce(%a, %b)": 2 * 2 * 12288,
    "((f32[4096]{0}, f32[64]{0}), (f32[1024]{0}, f32[16]{0}), s32[]) reduce-scatter-start(%a, %b)": 12288 + 192,
    "(f32[1024]{0}, f32[16]{0}) reduce-scatter(%a, %b)": 12288 + 192,
    "((f32[64]{0}, bf16[32]{0}), (f32[64]{0}, bf16[32]{0}), u32[], u32[]) collective-permute-start(%a, %b)": 320,
    "(f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%a)": 256,
    "((f32[64]{0}), f32[64]{0}, u32[]) all-to-all-start(%a)": 192,
    "(f8e4m3fn[64]{0}, f8e5m2[64]{0}, pred[64]{0}) all-to-all(%a, %b, %c)": 144,
}


@pytest.mark.parametrize("groups", ["replica_groups={{0,1,2,3}}", "replica_groups={}", "replica_groups=[2,4]<=[8]"])
def test_every_array_of_a_collective_is_counted_once(groups):
    partitions = 4 if groups.endswith("={}") else 8
    for line, want in ASYNCHRONOUS.items():
        hlo = f"HloModule jit_f, num_partitions={partitions}\n\nENTRY %main (p: f32[1]) -> f32[1] {{\n  %x = {line}, {groups}\n}}\n"
        assert sum(wire_bytes(hlo).values()) == want, line


# Parameters as the models' cards state them, in billions.
@pytest.mark.parametrize(
    "name, billions",
    [
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen3-32B", 32.76),
        ("Qwen/Qwen3-30B-A3B", 30.53),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 80.0),
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("meta-llama/Llama-3.2-1B", 1.24),
        ("meta-llama/Llama-4-Maverick-17B-128E", 400),
        ("mistralai/Mistral-7B-v0.3", 7.25),
        ("mistralai/Mistral-Nemo-Base-2407", 12.25),
        ("HuggingFaceTB/SmolLM3-3B", 3.08),
        ("allenai/OLMo-2-1124-7B", 7.30),
        ("google/gemma-2-2b", 2.61),
        ("google/gemma-3-1b-pt", 1.00),
        ("mistralai/Mixtral-8x7B-v0.1", 46.7),
        ("microsoft/phi-1_5", 1.42),
        ("microsoft/phi-2", 2.78),
        ("microsoft/Phi-3-mini-4k-instruct", 3.82),
        ("microsoft/phi-4", 14.66),
    ],
)
def test_public_models_have_as_many_parameters_as_published(name, billions):
    count = sum(math.prod(x.shape) for x in abstract_parameters(config_from_hf(PUBLIC[name])).values())
    assert abs(count / 1e9 - billions) < 0.006 * billions


def test_every_public_model_is_a_valid_source():
    for name, hf in PUBLIC.items():
        config = config_from_hf(hf)
        assert config_from_hf(config_to_hf(config)) == config, name


def test_patterns_by_fraction_are_spread_evenly():
    config = tiny_config("-".join("*" * 8))
    assert spread_pattern("GKA:0.5", config) == "*-GKA-*-GKA-*-GKA-*-GKA"
    assert spread_pattern("GDN:0.25", config).split("-").count("GDN") == 2
    assert spread_pattern("-".join(["*", "M2"] * 4), config) == "-".join(["*", "M2"] * 4)
    for wrong in ("GKA:2", "GKA:x", "*:0.5", "*-GKA"):
        with pytest.raises(ValueError):
            spread_pattern(wrong, config)


def test_states_do_not_grow_with_the_context_and_caches_do():
    config = config_from_hf(PUBLIC["Qwen/Qwen3-8B"])
    gka = config.with_pattern("-".join(["GKA"] * 36))
    assert state_bytes(gka, 1024) == state_bytes(gka, 131072)
    keys_and_values = 36 * 2 * 8 * 128 * 2
    grown = state_bytes(config, 131072) - state_bytes(config, 65536)
    assert grown == 65536 * (keys_and_values + 36 * 8)  # and each layer's positions and segments


def test_unknown_hardware_is_refused_by_name():
    assert accelerator("v5p:4x4x4")[2] == "4x4x4" and device_count("v5p", "4x4x4") == 64 and device_count("tpu7x", "2x2x1") == 8
    for wrong, words in (
        ("v9:2x2", "unknown chip 'v9'"),
        ("v5e:3x3", "slices of v5e: 2x2"),
        ("h100:big", "give the number"),
        ("h100:0", "give the number"),
    ):
        with pytest.raises(ValueError, match=words):
            accelerator(wrong)


def test_chosen_meshes_divide_the_model_and_cut_long_rows():
    config = config_from_hf(PUBLIC["Qwen/Qwen3-8B"])
    assert next(meshes(Job(config, "train", 131072, 0), 64)) == {"fsdp": 8, "seq": 8}
    assert next(meshes(Job(config, "train", 8192, 0), 16)) == {"fsdp": 16}
    assert all(m.get("tensor", 1) <= 8 for m in meshes(Job(config, "train", 131072, 0), 256))


def test_a_mesh_is_chosen_for_the_rows_that_are_asked_for():
    """Two rows on four GPUs: not one for each; and of a mesh that is given, -1 is what is left."""
    job = Job(tiny_config("*-*", **DENSE), "train", 64, 2)
    plan = make_plan(job, "h100:4")
    assert plan.job.rows == 2 and math.prod(plan.mesh.values()) == 4 and plan.mesh.get("fsdp", 1) <= 2
    plan = make_plan(dataclasses.replace(job, rows=0), "h100:4", {"fsdp": -1, "tensor": 2})
    assert plan.mesh == {"fsdp": 2, "tensor": 2} and plan.job.rows == 2
    with pytest.raises(ValueError, match="needs 8 devices, there are 4"):
        make_plan(job, "h100:4", {"fsdp": 8})


def test_advice_is_for_as_many_rows_as_were_asked_for(monkeypatch):
    pytest.importorskip("libtpu")
    compiled, hbm = [], accelerator("v5e:2x2")[1].hbm

    def compile_program(program):
        compiled.append(program.arguments[2]["input_ids"].shape[0])
        return Compiled(total=(1.2 if len(compiled) == 1 else 0.5) * hbm, temporaries=0.0, wire={}, operations=[], seconds=0.0)

    monkeypatch.setattr(planner, "compile_program", compile_program)
    job = Job(tiny_config("*-*", **DENSE), "train", 64, 16, remat="none")
    plan = make_plan(job, "v5e:2x2", {"fsdp": 4}, log=lambda line: None)
    assert compiled == [16, 16] and "--remat attention fits" in plan.advice


def test_advice_compiles_few_changes_and_none_that_cannot_fit(monkeypatch):
    """The compiler says here that nothing fits; then a few changes are tried, and none whose lower bound is too large."""
    pytest.importorskip("libtpu")
    compiled, hbm = [], accelerator("v5e:2x4")[1].hbm

    def compile_program(program):
        compiled.append(program)
        return Compiled(total=1.2 * hbm, temporaries=0.1 * hbm, wire={}, operations=[], seconds=0.0)

    monkeypatch.setattr(planner, "compile_program", compile_program)
    job = Job(tiny_config("*-*", **DENSE), "train", 64, 0)
    plan = make_plan(job, "v5e:2x4", log=lambda line: None)
    assert len(compiled) == 1 + planner.TRIES and plan.fits is False and "no mesh of v5e:2x4 is expected to fit" in plan.advice
    compiled.clear()
    monkeypatch.setattr(planner, "at_least", lambda job, sizes: 2.0 * hbm)
    make_plan(job, "v5e:2x4", log=lambda line: None)
    assert len(compiled) == 1


def test_the_smallest_slice_is_looked_for_among_all_that_can_hold_the_state(monkeypatch):
    """Slices are compiled from the smallest on, without those that are too small for what a step must hold."""
    pytest.importorskip("libtpu")
    lines, hbm = [], accelerator("v5e:2x2")[1].hbm
    totals = iter([1.1 * hbm, 0.9 * hbm])
    monkeypatch.setattr(planner, "compile_program", lambda program: Compiled(next(totals), 0.0, {}, [], 0.0))
    job = Job(tiny_config("*-*", **DENSE), "train", 64, 0)
    assert make_plan(job, "v5e", log=lines.append).topology == "v5e:2x4" and len(lines) == 2
    totals = iter([0.9 * hbm])
    monkeypatch.setattr(planner, "at_least", lambda job, sizes: 4.0 * hbm / math.prod(sizes.values()) + 1)
    lines.clear()
    assert make_plan(job, "v5e", log=lines.append).topology == "v5e:2x4" and "v5e:2x2: too small" in lines[0]


def test_of_gpus_is_known_what_a_step_must_hold_and_not_whether_it_fits():
    sizes = dict(vocab_size=8192, hidden_size=4096, intermediate_size=16384)
    config = tiny_config("*-GDN", **{**DENSE, **sizes})
    job = Job(config, "train", 8192, 0)
    plan = make_plan(job, "h100:2")
    state = 12 * sum(math.prod(x.shape) for x in abstract_parameters(config).values()) / 2  # parameters, two moments each
    layers = 2 * 2 * 8192 * 4096  # each layer's input in bf16, of the one row that a device has
    assert plan.total == pytest.approx(state + layers, rel=1e-3)
    assert plan.fits is None and plan.temporaries is None and not plan.compiled
    rows = dict(plan_rows(plan, 1e9, 0.4))
    assert rows["fits"].startswith("not known: at least 2.9") and "temporaries are not counted" in rows["fits"]
    assert "  temporaries" not in rows and plan_json(plan, 1e9, 0.4)["fits"] is None
    many = make_plan(dataclasses.replace(job, seq_len=2**20, rows=32), "h100:2")
    assert many.fits is False and dict(plan_rows(many, 1e9, 0.4))["fits"].startswith("NO: at least ")


def states_by_device(pattern, sizes):
    """Of a decoding step's states: (whole shape, a device's shape) by path."""
    program = decoding_program(Job(tiny_config(pattern, vocab_size=64), "decode", 32, 4), abstract_mesh(sizes))
    return {
        jax.tree_util.keystr(path): (x.shape, x.sharding.shard_shape(x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path(program.arguments[0])
    }


def test_decode_states_are_cut_by_the_axes_that_their_mixers_declare():
    """Rows over fsdp, heads and channels of heads over tensor; slots, windows and head dimensions not at all."""
    found = states_by_device("*-GKA-GDN-M2-SWA-BMF", {"fsdp": 2, "tensor": 2})
    assert len(found) == 5 + 5 + 4 + 2 + 5 + (5 + 5 + 5)
    for path, (shape, local) in found.items():
        cut = [i for i, (a, b) in enumerate(zip(shape, local, strict=True)) if a != b]
        heads = [1] if path.endswith((".h_kk", ".h_kv", ".S")) else [2] if path.endswith((".k", ".v", "conv")) else []
        assert cut == ([0, *heads] if shape else []), path


def test_a_state_of_any_rank_is_cut_as_it_says(monkeypatch):
    """A diagonal state-space state [B, D, N], channels over tensor, and a state of five axes with heads third."""
    axes = Mamba2State(("batch", None, "heads", None, None), ("batch", "heads", None))

    def states(self, batch, max_length, dtype):
        return Mamba2State(jnp.zeros((batch, 3, 4, 2, 2)), jnp.zeros((batch, 8, 16)))

    monkeypatch.setattr(Mamba2, "init_state", states)
    monkeypatch.setattr(Mamba2, "state_axes", lambda self: axes)
    found = states_by_device("*-M2", {"fsdp": 2, "tensor": 2})
    assert found["[1].S"] == ((4, 3, 4, 2, 2), (2, 3, 2, 2, 2)) and found["[1].conv"] == ((4, 8, 16), (2, 4, 16))


DENSE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=False)


def sent(sizes, pattern="*-*", rows=8, seq_len=64, program="train", **changes):
    """What the formula says that a device sends, by kind; a model whose matrices are counted by hand below."""
    job = Job(tiny_config(pattern, **{**DENSE, **changes}), program, seq_len, rows)
    return traffic(job, sizes).by_kind()


LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, MLP
NORMS, HEAD = 5 * 32, 64 * 32


def test_gpu_traffic_of_copies_is_the_gradients_sum():
    found = sent({"data": 4})
    assert found == {"all-reduce of gradients": 2 * 3 / 4 * (2 * (2 * LAYER + NORMS + HEAD) + 4 * HEAD)}


def test_gpu_traffic_of_parameters_in_parts_is_two_gathers_and_a_scatter_over_seq_too():
    for sizes in ({"fsdp": 4}, {"seq": 4}, {"fsdp": 2, "seq": 2}):
        found = sent(sizes)
        matrices = 2 * (2 * LAYER)
        assert found["all-gather of parameters"] == 3 / 4 * (2 * matrices + 2 * HEAD)  # the head's once
        assert found["reduce-scatter of gradients"] == 3 / 4 * (matrices + 2 * HEAD)
        assert found["all-reduce of gradients"] == 2 * 3 / 4 * 2 * NORMS
        assert found["all-to-all of embeddings"] == 3 / 4 * 2 * 2 * (8 * 64 / 4) * 32


def test_gpu_traffic_of_tensor_parallel_layers_is_their_activations():
    hidden = 2 * (8 * 64) * 32
    found = sent({"tensor": 2})
    assert found == {"all-reduce of activations": 2 / 2 * hidden * (2 * 2 * 3 + 2)}  # two layers forward, again and backward
    bare = sent({"tensor": 2}, intermediate_size=0)
    assert bare == {"all-reduce of activations": 2 / 2 * hidden * (2 * 1 * 3 + 2)}  # each layer sums once, behind its mixer


def test_gpu_traffic_of_the_ring_is_keys_forward_again_and_backward_with_their_gradients():
    keys = (8 * 64 / 4) * 2 * 8 * 2  # numbers of keys and values on a device
    assert sent({"seq": 4})["ring attention"] == 3 * keys * 2 * (2 + 2 + 2 + 4)
    # the attention that learns likewise; the teacher's two layers forward once
    assert sent({"seq": 4}, pattern="*-GDN", program="align")["ring attention"] == 3 * keys * ((2 + 2) + 2 + 4 + 2 * 2)


def test_gpu_traffic_of_the_ring_without_attention_made_again():
    keys = (8 * 64 / 4) * 2 * 8 * 2
    config = tiny_config("*-*", **DENSE)
    for remat in ("none", "attention"):
        found = traffic(Job(config, "train", 64, 8, (), remat), {"seq": 4}).by_kind()
        assert found["ring attention"] == 3 * keys * 2 * (2 + 2 + 4)


def test_gpu_traffic_of_aligning_gathers_the_teacher_once_and_the_head_not_at_all():
    config = tiny_config("*-GDN", **DENSE)
    gdn = [x.shape for n, x in abstract_parameters(config).items() if ".gdn." in n and "conv1d" not in n and len(x.shape) == 2]
    mixer = sum(map(math.prod, gdn))
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    found = sent({"fsdp": 4}, pattern="*-GDN", program="align")
    assert found["all-gather of parameters"] == 3 / 4 * 2 * (2 * (LAYER + LAYER - attention + mixer) + attention)
    assert found["reduce-scatter of gradients"] == 3 / 4 * 2 * mixer
    assert found["all-to-all of embeddings"] == 3 / 4 * 2 * (8 * 64 / 4) * 32  # forward alone: the table does not learn


def test_gpu_traffic_of_the_ring_is_of_the_layers_that_take_it():
    """Windows of 8 tokens send halos, which are left out; a window that reaches over half of the row takes the ring."""
    keys = (8 * 64 / 4) * 2 * 8 * 2
    for pattern, windows, layers in (("*-*", (8, None), 1), ("SWA-*", (None, 8), 0), ("*-*", (60, 64), 2), ("BMF-*", (), 1)):
        assert sent({"seq": 4}, pattern=pattern, attention_windows=windows).get("ring attention", 0) == 3 * keys * layers * 10


@pytest.mark.parametrize("case", ["aligned", *(pytest.param(case, marks=pytest.mark.long) for case in ("experts", "distilled"))])
def test_gpu_traffic_is_that_of_the_step_compiled_for_eight_devices(case):
    """Gathers and exchanges of tokens to 1 %. CPU programs sum where they could scatter, and sum the gradients of queries, keys
    and values one by one: 1.5 times the formula's sums at most. The first keys that travel again are those that come for the
    gradient: what is permuted is at least 0.7 of the formula."""
    found, formula = json.loads(run_processes("tests.plan.compiled_traffic", 1, case).splitlines()[-1])
    assert found["all-gather"] == pytest.approx(formula["all-gather of parameters"], rel=0.01)
    assert found["all-to-all"] == formula["all-to-all of embeddings"]
    scattered = found.get("reduce-scatter", 0)
    sums = 2 * (formula["reduce-scatter of gradients"] - scattered) + sum(n for kind, n in formula.items() if "all-reduce" in kind)
    assert 0.99 * sums < found["all-reduce"] < 1.5 * sums
    permuted = formula["ring attention"] + formula.get("tokens to experts", 0)
    assert 0.7 * permuted < found["collective-permute"] < 1.01 * permuted


MIXTURE = dict(family="qwen3_moe", moe=MoEConfig(8, 2, 24))
FLOPS = {
    "kept": ("*-*", "train", "none", (), {}),
    "attention kept": ("*-*", "train", "attention", (), {}),
    "made again": ("*-*", "train", "full", (), {}),
    "of queries": ("*-*", "train", "none", ("q_proj",), {}),
    "tied": ("*-*", "train", "none", ("self_attn",), {"tie_embeddings": True}),
    "a frozen head": ("*-*", "train", "none", ("q_proj",), {"vocab_size": 2048}),
    "a head that trains": ("*-*", "train", "none", ("q_proj", "lm_head"), {"vocab_size": 2048}),
    "a tied table that trains": ("*-*", "train", "none", ("q_proj", "embed_tokens"), {"vocab_size": 2048, "tie_embeddings": True}),
    "windows": ("*-SWA", "train", "none", (), {"attention_windows": (96, None)}),
    "experts": ("*-*", "train", "none", (), MIXTURE),
    "without MLPs": ("*-*", "train", "none", (), {"intermediate_size": 0, "vocab_size": 256}),
    "some heads": ("GDN[0,1,3]-*", "train", "none", ("q_proj",), {"vocab_size": 2048}),
    "aligned": ("SWA-*-SWA", "align", "full", (), {"vocab_size": 1024}),
    "distilled": ("*-SWA-*", "distill", "full", (), {"vocab_size": 1024}),
    "decoded": ("*-*-SWA", "decode", "full", (), {"attention_windows": (40, None, None)}),
    "decoded by experts": ("*-*", "decode", "full", (), MIXTURE),
}


@pytest.mark.parametrize("case", FLOPS)
def test_flops_by_formula_are_those_of_the_traced_step(monkeypatch, case):
    """Within 4 %: attention's diagonal tiles are computed in full, and of a layer that is made again the last product is not."""
    monkeypatch.setattr(attention_block, "TILE", 8)
    monkeypatch.setattr(attention_block, "LANES", 8)
    pattern, program, remat, trainable, changes = FLOPS[case]
    config = tiny_config(pattern, **{**DENSE, "swa": SWAConfig(64), **changes})
    teacher = tiny_config("*-*-*-*", **{**DENSE, **MIXTURE, "hidden_size": 64, "num_heads": 8, "vocab_size": 1100})
    job = Job(config, program, 256, 1, trainable, remat, teacher=teacher if program == "distill" else None)
    program = make_program(job, make_mesh({}, jax.devices()[:1]))
    with jax.set_mesh(program.mesh):
        jaxpr = jax.make_jaxpr(program.function)(*program.arguments).jaxpr
    traced = count_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])  # as the compiler removes what is not used
    assert flops_by_formula(job) == pytest.approx(traced, rel=0.04)


def test_decoding_gathers_the_parameters_and_trains_nothing():
    assert sent({"fsdp": 4}, program="decode") == {
        "all-gather of parameters": 3 / 4 * 2 * (2 * LAYER + HEAD),
        "all-to-all of embeddings": 3 / 4 * 2 * (8 / 4) * 32,
    }


def test_links_between_nodes_are_the_network_s():
    h100 = accelerator("h100:16")[1]
    for sizes, axes, want in (
        ({"fsdp": 8}, ("fsdp",), 450e9),
        ({"fsdp": 16}, ("fsdp",), 8 * 50e9),  # eight members in each node, each with its adapter
        ({"data": 2, "fsdp": 8}, ("data",), 50e9),
        ({"data": 2, "fsdp": 8}, ("fsdp",), 450e9),
        ({"data": 4, "fsdp": 4}, ("data",), 2 * 50e9),
        ({"fsdp": 4, "tensor": 4}, ("tensor",), 450e9),
    ):
        assert link_speed(h100, sizes, axes) == want, (sizes, axes)
    assert link_speed(accelerator("v5p:4x4x4")[1], {"fsdp": 64}, ("fsdp",)) == 600e9


def test_a_step_s_floor_and_the_hours_are_those_of_its_slowest_resource():
    """1e12 FLOPs on two devices of 1e12 a second, 8 GB of state at 2 GB/s, 3 s on the wire; 16 rows of 1000 tokens per step."""
    chip = accelerator("h100:2")[1]._replace(flops=1e12, bandwidth=2e9)
    job = Job(tiny_config("*-*", **DENSE), "train", 1000, 16)
    plan = make_plan(job, "h100:2", {"fsdp": 2})
    plan = dataclasses.replace(plan, accelerator=chip, parameters=3e9, optimizer=5e9, caches=0.0, flops=1e12, wire_seconds=3.0)
    assert plan.floors == {"compute": 0.5, "memory": 4.0, "wire": 3.0} and plan.floor == 4.0
    assert plan.bound == 4.0 and plan.hours(tokens=9e6, efficiency=0.5) == 9e6 / 16000 * 4.0 / 0.5 / 3600
    parts = dataclasses.replace(plan, parts={"products": 0.5, "other operations": 5.5})
    assert parts.bound == 6.0 and dict(plan_rows(parts, 9e6, 1.0))["hours"].startswith("at least 0.9 for 9e+06 tokens")


def test_a_plan_s_bytes_are_those_of_its_parameters_and_their_optimizer():
    """Float32 parameters, two moments each; matrices in four parts, norms on every device."""
    plan = make_plan(Job(tiny_config("*-*", **DENSE), "train", 64, 0), "h100:4", {"fsdp": 4})
    held = (2 * LAYER + 2 * HEAD) // 4 + NORMS
    assert plan.parameters == 4 * held and 2 * 4 * held <= plan.optimizer <= 2 * 4 * held + 64
    assert plan.kept == 2 * 2 * 64 * 32  # a layer's input for each of a device's tokens, in bf16


def test_only_attention_keeps_outputs_under_the_remat_of_attention():
    """A head of 8 channels that `tensor` replicates counts on both devices, the heads of attention are shared, GDN has none."""
    config = tiny_config("*-GDN[1]", **DENSE)
    plan = make_plan(Job(config, "train", 64, 2, remat="attention"), "h100:2", {"tensor": 2})
    inputs, outputs = 2 * config.hidden_size, 8 * (config.num_heads // 2 + 1)
    assert plan.kept == 2 * (2 * 64) * (inputs + outputs)


PROGRAM = """
import sys
from hybrid_jax.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def plan(tmp_path, *arguments):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config("*-*-*-*", vocab_size=64, hidden_size=32))))
    command = [sys.executable, "-c", PROGRAM, "plan", "--source", str(tmp_path), "--json", str(tmp_path / "plan.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads((tmp_path / "plan.json").read_text()) if done.returncode == 0 else None


def test_a_step_is_compiled_for_a_slice_that_is_not_there(tmp_path):
    arguments = ("--pattern", "GDN:0.5", "--topology", "v5e:2x2", "--mesh", "fsdp=2,seq=2", "--seq-len", "1024")
    done, answer = plan(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert answer["fits"] and answer["compiled"] and answer["pattern"] == "*-GDN-*-GDN" and answer["rows"] == 2
    config = tiny_config("*-GDN-*-GDN", vocab_size=64, hidden_size=32)
    count = sum(math.prod(x.shape) for x in abstract_parameters(config).values())
    assert count < answer["parameters"] < 4 * count  # sharded over four devices, except norms and the like
    assert 2 * answer["parameters"] <= answer["optimizer"] < 2.1 * answer["parameters"]
    assert answer["wire"]["collective-permute"] > 0 and answer["flops"] > 6 * 2048 * count / 2
    assert "fits" in done.stdout and "yes" in done.stdout


def test_a_step_with_a_larger_teacher_is_compiled_from_the_two_configs(tmp_path):
    """The teacher's experts are sharded over the slice beside a student without any; its matrices are in bfloat16."""
    teacher = tiny_config("*-*-*", **{**DENSE, **MIXTURE, "qk_norm": True, "hidden_size": 64, "vocab_size": 128})
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config_to_hf(teacher)))
    arguments = ("--program", "distill", "--teacher", str(tmp_path / "teacher"), "--seq-len", "256")
    done, answer = plan(tmp_path, *arguments, "--topology", "v5e:2x2", "--mesh", "expert=2,seq=2")
    assert done.returncode == 0, done.stderr[-2000:]
    shapes = abstract_parameters(dataclasses.replace(teacher, vocab_size=64)).values()
    matrices = 2 * sum(math.prod(x.shape) for x in shapes if len(x.shape) > 1)
    assert matrices / 4 <= answer["teacher"] < 1.1 * matrices / 4 and answer["compiled"] and answer["fits"]
    assert "of which the teacher's own copies" in done.stdout


def test_decoding_is_planned_with_its_caches(tmp_path):
    done, answer = plan(
        tmp_path, "--pattern", "GKA:0.5", "--topology", "v5e:2x2", "--program", "decode", "--rows", "4", "--seq-len", "256"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = tiny_config("*-GKA-*-GKA", vocab_size=64, hidden_size=32)
    assert answer["caches"] == pytest.approx(state_bytes(config, 256, rows=4) / 4, rel=0.01)
    table = [[cell.strip() for cell in line.split("│")[1:3]] for line in done.stdout.splitlines() if line.startswith("│")]
    assert ["256", "1"] in table and ["256", "4"] in table and ["131,072", "4"] in table and "hybrid / source" in done.stdout


def test_bad_plans_are_refused(tmp_path):
    for arguments, words in (
        (("--topology", "v5e:2x2", "--mesh", "seq=4", "--seq-len", "1001"), "'seq' divides seq_len"),
        (("--topology", "v5e:2x2", "--mesh", "fsdp=8"), "needs 8 devices, there are 4"),
        (("--topology", "v5e:2x2", "--program", "align"), "needs a --pattern"),
        (("--topology", "v5e:2x2", "--program", "serve"), "expected one of align, train, decode"),
        (("--topology", "v5e:2x2", "--program", "distill"), "--program distill and --teacher belong together"),
        (("--topology", "v5e", "--mesh", "fsdp=8"), "--mesh needs a complete --topology"),
    ):
        done, _ = plan(tmp_path, *arguments)
        assert done.returncode == 1 and words in done.stderr, done.stderr[-500:]
        assert "Traceback" not in done.stderr


def test_a_step_whose_temporaries_the_compiler_refuses_does_not_fit():
    class Refused:
        def lower(self, *arguments):
            return self

        def compile(self):
            sizes = "the total memory required for HLO temporaries (31.82G) exceeds available HBM (31.25G)."
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {sizes}")

    program = Program(Refused(), (), make_mesh({"data": 1}, jax.devices()[:1]), 1e9, 2e9, 0.0, 5e9)
    compiled = compile_program(program)
    assert compiled.temporaries == 31.82 * 2**30 and compiled.total == 3e9 + compiled.temporaries
