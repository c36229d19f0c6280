"""Stage 0, fusing, selection."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import SWAConfig
from hybrid_jax.parameters import split_model
from hybrid_jax.priming import select
from hybrid_jax.priming.fuse import fuse, unfuse
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.priming.select import Selection, pattern_from_scores
from tests.conftest import relative_error, tiny_model

IDS = np.random.default_rng(0).integers(0, 61, (2, 12))


def parameters(model):
    return {n: np.asarray(v) for n, v in split_model(model)[1].items()}


def test_a_window_longer_than_the_text_makes_swa_the_source():
    source = tiny_model("*-*", swa=SWAConfig(64))
    assert relative_error(initialize_hybrid(source, "SWA-SWA")(IDS), source(IDS)) < 1e-6


def test_mamba2_takes_q_k_v_o_and_the_norms_in_its_own_order():
    source = tiny_model("*")
    have, got = parameters(source), parameters(initialize_hybrid(source, "M2"))
    attention = {n.removeprefix("layers.0.self_attn."): v for n, v in have.items() if "self_attn" in n}
    z, x, b, c, dt = np.split(got["layers.0.mamba.in_proj.kernel"], [32, 48, 64, 96], axis=1)
    for part, name in ((x, "v_proj"), (b, "k_proj"), (c, "q_proj")):
        assert np.array_equal(part, attention[f"{name}.kernel"])
    gate = 0.5 * (attention["o_proj.kernel"].T + np.repeat(attention["v_proj.kernel"], 2, axis=1))
    assert np.allclose(z, gate) and dt.shape == (24, 4)
    assert np.array_equal(got["layers.0.mamba.out_proj.kernel"], attention["o_proj.kernel"])
    assert np.array_equal(got["layers.0.mamba.C_norm.weight"], attention["q_norm.weight"])
    assert np.array_equal(got["layers.0.mamba.D"], np.ones(4))


def test_bmojo_copies_attention_to_both_sets_and_its_mixer_as_alone():
    from hybrid_jax.config import BMojoConfig

    source = tiny_model("*", bmojo=BMojoConfig(4, "gka", tie_attn_weights=False))
    have, got, alone = (parameters(m) for m in (source, initialize_hybrid(source, "BMF"), initialize_hybrid(source, "GKA")))
    for p in "qkvo":
        assert np.array_equal(got[f"layers.0.bmojo_f.bmojo_attn.{p}_proj.kernel"], have[f"layers.0.self_attn.{p}_proj.kernel"])
    assert np.array_equal(got["layers.0.bmojo_f.bmojo_attn.k_proj_.kernel"], have["layers.0.self_attn.k_proj.kernel"])
    assert np.array_equal(got["layers.0.bmojo_f.bmojo_attn.q_norm_.weight"], have["layers.0.self_attn.q_norm.weight"])
    assert np.array_equal(got["layers.0.bmojo_f.gka.g_proj.kernel"], alone["layers.0.gka.g_proj.kernel"])


def test_fresh_parameters_lie_where_the_reference_puts_them():
    got = parameters(initialize_hybrid(tiny_model("*"), "GKA"))
    a = np.exp(got["layers.0.gka.A_log"])
    dt = np.log1p(np.exp(got["layers.0.gka.dt_bias"]))
    assert (a > 0).all() and (a <= 16).all()
    assert (dt >= 1e-4 - 1e-7).all() and (dt <= 0.1 + 1e-6).all()
    assert np.abs(got["layers.0.gka.q_conv1d.kernel"]).max() <= 0.5
    assert np.abs(got["layers.0.gka.a_proj.kernel"]).max() <= 24**-0.5
    assert np.array_equal(got["layers.0.gka.o_norm.weight"], np.ones(8))


def test_stage_0_depends_on_its_seed_alone_and_keeps_other_layers():
    source = tiny_model("*-*")
    a, b, c = (parameters(initialize_hybrid(source, "*-GKA", seed=s)) for s in (1, 1, 2))
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert not np.array_equal(a["layers.1.gka.A_log"], c["layers.1.gka.A_log"])
    have = parameters(source)
    assert all(np.array_equal(a[n], have[n]) for n in a if n in have)


def test_only_attention_can_be_converted():
    with pytest.raises(ValueError, match="layer 1 is 'GDN'.*'GKA'"):
        initialize_hybrid(tiny_model("*-GDN"), "*-GKA")


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
    monkeypatch.setattr(select, "score_layers", lambda *_: [0.3, 0.2, -0.1, 0.4])
    how = {"mixer": "GDN", "fraction": 0.25, "window": 4}
    pattern = select.choose_pattern(tiny_model("*-*-*-*"), "", how, None, tmp_path)
    record = json.loads((tmp_path / "selection.json").read_text())
    assert pattern == record["pattern"] == "*-*-GDN-*"
    assert (record["scores"], record["fraction"], record["window"]) == ([0.3, 0.2, -0.1, 0.4], 0.25, 4)


def test_selection_converts_the_cheapest_layers():
    assert pattern_from_scores([0.3, -0.1, 0.2, 0.0], "GDN", 0.5) == "*-GDN-*-GDN"
    assert pattern_from_scores([0.0, 0.0, 0.0], "GKA", 1 / 3) == "GKA-*-*"
    with pytest.raises(ValueError, match="fraction"):
        Selection(fraction=0)
    with pytest.raises(ValueError, match="mixer"):
        Selection(mixer="*")
