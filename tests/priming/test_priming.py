"""Stage 0, fusing, selection."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import BMojoConfig, DiscreteMamba2Config, GDNConfig, Mamba3Config, SWAConfig
from hybrid_jax.layers.recurrent import init_a_log, init_dt_bias
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.priming.fuse import fuse, unfuse
from hybrid_jax.priming.initialize import initialize_hybrid, new_model
from hybrid_jax.selection import select
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.select import Selection, pattern_from_scores
from tests.conftest import relative_error, tiny_config, tiny_model

IDS = np.random.default_rng(0).integers(0, 61, (2, 12))


def parameters(model):
    return {n: np.asarray(v) for n, v in split_model(model)[1].items()}


def test_a_window_longer_than_the_text_makes_swa_the_source():
    source = tiny_model("*-*", swa=SWAConfig(64))
    assert relative_error(initialize_hybrid(source, "SWA-SWA")(IDS), source(IDS)) < 1e-6


def test_mamba2_takes_q_k_v_o_and_the_norms_in_its_own_order():
    source = tiny_model("*")
    for name, start in (("q_norm", 1.0), ("k_norm", 2.0)):
        weight = getattr(source.layers[0].self_attn, name).weight
        weight.set_value(jnp.arange(8.0) + start)
    have, got = parameters(source), parameters(initialize_hybrid(source, "M2"))
    attention = {n.removeprefix("layers.0.self_attn."): v for n, v in have.items() if "self_attn" in n}
    z, x, b, c, dt = np.split(got["layers.0.mamba.in_proj.kernel"], [32, 48, 64, 96], axis=1)
    for part, name in ((x, "v_proj"), (b, "k_proj"), (c, "q_proj")):
        assert np.array_equal(part, attention[f"{name}.kernel"])
    gate = 0.5 * (attention["o_proj.kernel"].T + np.repeat(attention["v_proj.kernel"], 2, axis=1))
    assert np.allclose(z, gate) and dt.shape == (24, 4)
    assert np.array_equal(got["layers.0.mamba.out_proj.kernel"], attention["o_proj.kernel"])
    assert np.array_equal(got["layers.0.mamba.C_norm.weight"], attention["q_norm.weight"])
    assert np.array_equal(got["layers.0.mamba.B_norm.weight"], attention["k_norm.weight"])
    assert np.array_equal(got["layers.0.mamba.D"], np.ones(4))


def test_mamba3_takes_q_k_v_o_and_the_norms_and_neither_turns_nor_adds_a_bias_at_first():
    source = tiny_model("*")
    for name, start in (("q_norm", 1.0), ("k_norm", 2.0)):
        getattr(source.layers[0].self_attn, name).weight.set_value(jnp.arange(8.0) + start)
    have, got, fresh = (parameters(m) for m in (source, initialize_hybrid(source, "M3"), tiny_model("M3")))
    attention = {n.removeprefix("layers.0.self_attn."): v for n, v in have.items() if "self_attn" in n}
    z, x, b, c, rest, angle = np.split(got["layers.0.mamba3.in_proj.kernel"], [32, 48, 64, 96, 108], axis=1)
    for part, name in ((x, "v_proj"), (b, "k_proj"), (c, "q_proj")):
        assert np.array_equal(part, attention[f"{name}.kernel"])
    gate = 0.5 * (attention["o_proj.kernel"].T + np.repeat(attention["v_proj.kernel"], 2, axis=1))
    assert np.allclose(z, gate) and rest.std() > 0.1 and angle.shape == (24, 2) and not angle.any()
    assert np.array_equal(got["layers.0.mamba3.out_proj.kernel"], attention["o_proj.kernel"])
    for name, norm in (("B", "k"), ("C", "q")):
        assert np.array_equal(got[f"layers.0.mamba3.{name}_norm.weight"], attention[f"{norm}_norm.weight"])
        assert not got[f"layers.0.mamba3.{name}_bias"].any() and (fresh[f"layers.0.mamba3.{name}_bias"] == 1).all()


def test_discrete_mamba2_takes_v_k_q_of_every_query_head_o_and_their_biases_and_its_gate_is_open():
    source = tiny_model("*", qkv_bias=True)
    for name in "qkv":
        bias = getattr(source.layers[0].self_attn, f"{name}_proj").bias
        bias.set_value(jnp.arange(1.0, 1 + bias.shape[0]) / 7)
    have, got = parameters(source), parameters(initialize_hybrid(source, "DM2"))
    attention = {n.removeprefix("layers.0.self_attn."): v for n, v in have.items() if "self_attn" in n}
    x, b, c, z, a = np.split(got["layers.0.discrete_mamba2.in_proj.kernel"], [32, 64, 96, 128], axis=1)
    biases = np.split(got["layers.0.discrete_mamba2.conv1d.bias"], 3)
    for part, bias, name in zip((x, b, c), biases, "vkq", strict=True):
        copies = 1 if name == "q" else 2
        for begun, theirs in ((part, attention[f"{name}_proj.kernel"]), (bias, attention[f"{name}_proj.bias"])):
            heads = theirs.reshape(*theirs.shape[:-1], -1, 8)
            assert np.array_equal(begun, np.repeat(heads, copies, axis=-2).reshape(begun.shape))
    assert np.array_equal(got["layers.0.discrete_mamba2.out_proj.kernel"], attention["o_proj.kernel"])
    assert not z.any() and a.std() > 0.1 and a.shape == (24, 4)
    gate = got["layers.0.discrete_mamba2.z_bias"]
    assert np.allclose(gate / (1 + np.exp(-gate)), 1, atol=1e-6)


def test_a_state_of_discrete_mamba2_that_is_not_attention_s_takes_only_v_and_o():
    for options in (dict(state_size=4), dict(qk_heads=2, state_size=16)):  # the second is as wide as attention's queries
        source = tiny_model("*", discrete_mamba2=DiscreteMamba2Config(**options))
        have = parameters(source)
        got, new = (parameters(initialize_hybrid(source, "DM2", copy_attention=copied)) for copied in (True, False))
        kernel, fresh = (x["layers.0.discrete_mamba2.in_proj.kernel"] for x in (got, new))
        values = np.repeat(have["layers.0.self_attn.v_proj.kernel"].reshape(24, 2, 8), 2, axis=1).reshape(24, 32)
        assert np.array_equal(kernel[:, :32], values) and np.array_equal(kernel[:, 32:], fresh[:, 32:])
        assert np.array_equal(got["layers.0.discrete_mamba2.out_proj.kernel"], have["layers.0.self_attn.o_proj.kernel"])


@pytest.mark.parametrize("how", ["transformers", "torch"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_new_discrete_mamba2_begins_as_mohawk_s_student_however_other_parameters_are_drawn(how, bias):
    config = tiny_config("DM2-DM2", hidden_size=48, discrete_mamba2=DiscreteMamba2Config(bias=bias))
    got = parameters(new_model(config, fresh_parameters=how))
    prefix = "layers.1.discrete_mamba2."
    mixer = {n.removeprefix(prefix): x for n, x in got.items() if n.startswith(prefix)}
    drawn, z, a = np.split(mixer["in_proj.kernel"], [96, 128], axis=1)
    for kernel, bound in ((drawn, 48**-0.5), (a, 48**-0.5), (mixer["out_proj.kernel"], 64**-0.5), *([(z, 48**-0.5)] * bias)):
        assert np.abs(kernel).max() <= bound and abs(kernel.std() * 3**0.5 / bound - 1) < 0.1
    assert z.any() == bias and ("z_bias" in mixer) != bias
    assert np.array_equal(mixer["conv1d.kernel"], np.tile([0, 0, 0, 1], (96, 1)))
    assert not any(x.any() for name, x in mixer.items() if name.endswith(".bias"))


@pytest.mark.parametrize("options", [dict(state_size=4), dict(rank=2), dict(groups=4)])
def test_a_state_of_mamba3_that_is_not_attention_s_takes_only_v_o_and_the_gate(options):
    source = tiny_model("*", mamba3=Mamba3Config(**options))
    have, got = parameters(source), parameters(initialize_hybrid(source, "M3"))
    assert np.array_equal(got["layers.0.mamba3.in_proj.kernel"][:, 32:48], have["layers.0.self_attn.v_proj.kernel"])
    assert np.array_equal(got["layers.0.mamba3.out_proj.kernel"], have["layers.0.self_attn.o_proj.kernel"])
    assert (got["layers.0.mamba3.B_bias"] == 1).all() and got["layers.0.mamba3.in_proj.kernel"][:, -1].any()


def test_bmojo_copies_attention_to_both_sets_and_its_mixer_as_alone():
    source = tiny_model("*", bmojo=BMojoConfig(4, "gka", tie_attn_weights=False))
    have, got, alone = (parameters(m) for m in (source, initialize_hybrid(source, "BMF"), initialize_hybrid(source, "GKA")))
    for p in "qkvo":
        assert np.array_equal(got[f"layers.0.bmojo_f.bmojo_attn.{p}_proj.kernel"], have[f"layers.0.self_attn.{p}_proj.kernel"])
    assert np.array_equal(got["layers.0.bmojo_f.bmojo_attn.k_proj_.kernel"], have["layers.0.self_attn.k_proj.kernel"])
    assert np.array_equal(got["layers.0.bmojo_f.bmojo_attn.q_norm_.weight"], have["layers.0.self_attn.q_norm.weight"])
    assert np.array_equal(got["layers.0.bmojo_f.gka.g_proj.kernel"], alone["layers.0.gka.g_proj.kernel"])


def test_decays_are_drawn_evenly_from_0_to_16_and_steps_log_evenly_from_a_thousandth_to_a_tenth():
    a = np.exp(np.asarray(init_a_log(nnx.Rngs(0), 4096)[...]))
    dt = np.log1p(np.exp(np.asarray(init_dt_bias(nnx.Rngs(1), 4096)[...], np.float64)))
    for drawn, low, high in ((a, 0, 16), (np.log(dt), np.log(1e-3), np.log(0.1))):
        quantiles = (np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1]) - low) / (high - low)
        assert np.allclose(quantiles, [0, 0.25, 0.5, 0.75, 1], atol=0.03)
        assert quantiles[0] > -1e-3 and quantiles[-1] < 1 + 1e-3


GATES = ("a_proj", "gk_proj", "b_proj", "alpha_proj")


def test_a_new_step_is_what_softplus_makes_of_its_bias():
    bias = init_dt_bias(nnx.Rngs(0), 3, low=1.0, high=1.0)
    assert np.allclose(np.log1p(np.exp(bias[...])), 1.0, atol=1e-6)


@pytest.mark.parametrize("symbol", ["GKA", "GDN", "M2", "BMF"])
def test_new_kernels_are_normal_with_the_models_initializer_range_and_new_biases_0(symbol):
    options = dict(gdn=GDNConfig(conv_bias=True), bmojo=BMojoConfig(4, "mamba2"), initializer_range=0.05)
    got = parameters(initialize_hybrid(tiny_model("*", **options), symbol))
    fresh = {n: v for n, v in got.items() if "conv1d" in n or any(gate in n for gate in GATES)}
    fresh |= {n: v[:, -4:] for n, v in got.items() if n.endswith("in_proj.kernel")}  # dt's columns
    assert len(fresh) == {"GKA": 8, "GDN": 8, "M2": 3, "BMF": 3}[symbol]
    for name, value in fresh.items():
        if name.endswith("bias"):
            assert not value.any(), name
        else:
            assert abs(value.std() / 0.05 - 1) < 0.3, name
    for name in (n for n in got if n.endswith(("o_norm.weight", "mamba.norm.weight", "mamba.D"))):
        assert (got[name] == 1).all(), name


def test_without_attention_s_weights_recurrent_mixers_begin_as_new_ones_and_windows_and_kept_heads_are_copied():
    source, pattern = tiny_model("*-*-*-*"), "GKA-M3-SWA-GDN[1]"
    copied, fresh = (parameters(initialize_hybrid(source, pattern, seed=3, copy_attention=c)) for c in (True, False))
    new = parameters(new_model(source.config.with_pattern(pattern), seed=3))
    differ = {n for n in copied if not np.array_equal(copied[n], fresh[n])}
    assert {n.split(".")[1] for n in differ} == {"0", "1", "3"}
    assert not [n for n in differ if n.startswith("layers.3.") and "recurrent." not in n]
    assert all(relative_error(fresh[n], new[n]) < 1e-6 for n in differ)


def test_torch_as_the_option_draws_uniformly_by_the_fan_in_and_changes_nothing_else():
    source = tiny_model("*-*", initializer_range=0.05)
    torch, other = (parameters(initialize_hybrid(source, "GKA-M2", fresh_parameters=f)) for f in ("torch", "transformers"))
    bounds = {f"{conv}1d": 0.5 for conv in ("q_conv", "k_conv", "v_conv", "conv")} | dict.fromkeys(GATES, 24**-0.5)
    drawn = [(n, bounds[n.split(".")[-2]]) for n in torch if n.split(".")[-2] in bounds]
    assert len(drawn) == 8 + 2
    for name, bound in drawn:
        assert np.abs(torch[name]).max() <= bound, name
        assert torch[name].size < 32 or abs(torch[name].std() * 3**0.5 / bound - 1) < 0.2, name
        assert not np.array_equal(torch[name], other[name]), name
    dt = torch["layers.1.mamba.in_proj.kernel"][:, -4:]
    assert np.abs(dt).max() <= 24**-0.5 and abs(dt.std() * 3**0.5 * 24**0.5 - 1) < 0.2
    names = {n for n, _ in drawn} | {"layers.1.mamba.in_proj.kernel"}
    assert all(np.array_equal(torch[n], other[n]) for n in torch if n not in names)
    assert np.array_equal(torch["layers.1.mamba.in_proj.kernel"][:, :-4], other["layers.1.mamba.in_proj.kernel"][:, :-4])
    with pytest.raises(ValueError, match="fresh_parameters must be one of 'transformers', 'torch', got 'zeros'"):
        initialize_hybrid(source, "GKA-M2", fresh_parameters="zeros")


def test_torch_as_the_option_leaves_norms_with_a_bias_alone():
    source = tiny_model("*", layer_norm=True)
    hybrid = parameters(initialize_hybrid(source, "GDN[0]", fresh_parameters="torch"))
    norms = [n for n in hybrid if n.endswith("_norm.bias")]
    assert norms and all((hybrid[n] == parameters(source)[f"layers.0.self_attn.{n.split('attention.')[1]}"]).all() for n in norms)


def test_stage_0_depends_on_its_seed_alone_and_keeps_other_layers():
    source = tiny_model("*-*")
    a, b, c = (parameters(initialize_hybrid(source, "*-GKA", seed=s)) for s in (1, 1, 2))
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert not np.array_equal(a["layers.1.gka.A_log"], c["layers.1.gka.A_log"])
    have = parameters(source)
    assert all(np.array_equal(a[n], have[n]) for n in a if n in have)


def test_only_attention_can_be_converted():
    """But for the pairs of `copies.COPIES`."""
    with pytest.raises(ValueError, match="layer 1 is 'GDN'.*'M2'"):
        initialize_hybrid(tiny_model("*-GDN"), "*-M2")


def test_the_two_streams_are_the_source_and_the_hybrid():
    source = tiny_model("*-*-*")
    hybrid = initialize_hybrid(source, "*-GKA-*")
    fused = fuse(hybrid, source)
    assert fused.config.pattern == "*DA-GKA*-*DA"
    streams = fused.two_streams(jnp.asarray(IDS))
    assert relative_error(fused.head(streams.teacher), source(IDS)) < 1e-5
    assert relative_error(fused.head(streams.student), hybrid(IDS)) < 1e-5
    assert relative_error(unfuse(fused)(IDS), hybrid(IDS)) < 1e-6
    with pytest.raises(ValueError, match="fuse the model first"):
        hybrid.two_streams(jnp.asarray(IDS))


def test_a_mixer_can_teach_another():
    source = tiny_model("*-*")
    fused = initialize_hybrid(source, "*DA-GDN>GKA")
    streams = fused.two_streams(jnp.asarray(IDS))
    assert relative_error(fused.head(streams.teacher), initialize_hybrid(source, "*-GDN")(IDS)) > 0  # fresh parts differ
    assert unfuse(fused).config.pattern == "*-GKA"


def test_the_configured_share_of_the_layers_is_converted_and_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(select, "score_layers", lambda *_: Scores([0.3, 0.2, -0.1, 0.4], "nats"))
    how = {"mixer": "GDN", "fraction": 0.25, "window": 4}
    pattern = select.choose_pattern(tiny_model("*-*-*-*"), "", select.Selection.from_config(how), None, tmp_path)
    record = json.loads((tmp_path / "selection.json").read_text())
    assert pattern == record["pattern"] == "*-*-GDN-*"
    assert (record["scores"], record["fraction"], record["window"]) == ([0.3, 0.2, -0.1, 0.4], 0.25, 4)


def test_selection_converts_the_cheapest_layers():
    assert pattern_from_scores([0.3, -0.1, 0.2, 0.0], "GDN", 0.5) == "*-GDN-*-GDN"
    assert pattern_from_scores([0.0, 0.0, 0.0], "GKA", 1 / 3) == "GKA-*-*"
    with pytest.raises(ValueError, match="fraction"):
        Selection(fraction=0)
    with pytest.raises(ValueError, match="select.fraction 0.1 of 4 layers is none"):
        pattern_from_scores([0.0] * 4, "GKA", 0.1)
    with pytest.raises(ValueError, match="score of layer 1 is nan"):
        pattern_from_scores([2.0, float("nan"), 1.0, 0.5], "GKA", 0.5)
    with pytest.raises(ValueError, match="mixer"):
        Selection(mixer="*")


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False}], ids=["the convolution's", "in_proj's"])
def test_biases_of_attention_reach_discrete_mamba_2_as_its_kernels_do(options):
    """A norm over all heads gives its weights to both."""
    changes = dict(family="olmo2", qkv_bias=True, qk_norm_all_heads=True, norms="behind", num_kv_heads=4)
    model = tiny_model("*", discrete_mamba2=DiscreteMamba2Config(**options), **changes)
    structure, parameters = split_model(model)
    rng = np.random.default_rng(0)
    parameters = {n: x + rng.normal(size=x.shape).astype(np.float32) if x.ndim == 1 else x for n, x in parameters.items()}
    hybrid = split_model(initialize_hybrid(join_model(structure, parameters), "DM2"))[1]
    own, attention = "layers.0.discrete_mamba2.", "layers.0.self_attn."
    got = hybrid[own + ("conv1d.bias" if not options else "in_proj.bias")][:96].reshape(3, 32)
    for part, name in zip(got, "vkq", strict=True):
        weight = 1 if name == "v" else parameters[f"{attention}{name}_norm.weight"]
        np.testing.assert_allclose(part, weight * parameters[f"{attention}{name}_proj.bias"], rtol=1e-6)
