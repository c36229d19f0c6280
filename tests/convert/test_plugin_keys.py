"""The mixers' dicts of an export: hybrid-model-factory's plugin for vLLM serves the model that was trained.

`served` is what the plugin takes from config.json, with its own defaults for absent keys (vllm-inference/src/primed_vllm).
"""

import argparse
import json

import pytest

from hybrid_jax.commands import convert, export
from hybrid_jax.config import BMojoConfig, GDNConfig, GKAConfig, Mamba2Config, MoEConfig
from hybrid_jax.families import config_from_hf, config_to_hf, plugin_notes
from hybrid_jax.mixers import KINDS
from tests.conftest import GOLDEN, tiny_config

# tiny_config: hidden_size 24, 4 heads and 2 key heads of size 8, rms_norm_eps 1e-6
OPTIONS = {"num_q_heads": 4, "num_k_heads": 2, "num_v_heads": 2, "head_dim": 8, "hidden_size": 24}


def served(hf):
    eps = hf["rms_norm_eps"]
    gdn, gka, mamba2, bmojo = (hf.get(f"{k}_config", {}) for k in ("gdn", "gka", "mamba2", "bmojo"))
    ssm = mamba2.get("ssm_cfg", {})
    return {
        "gdn block norms": gdn.get("norm_eps", eps),
        "gdn output norm": 1e-5,
        "gka block norms": gka.get("norm_eps", eps),
        "gka output norm": gka.get("norm_eps", 1e-6),
        "mamba2 block norms": mamba2.get("rms_norm_eps", 0.0),
        "mamba2 d_model": mamba2.get("d_model", 2048),
        "mamba2 d_inner": mamba2.get("d_inner", 128),
        "mamba2 d_xb": mamba2.get("d_xb", 128),
        "mamba2 d_state": ssm.get("d_state", 64),
        "mamba2 groups": ssm.get("ngroups", 1),
        "mamba2 B, C normed": mamba2.get("use_qk_norm", True),
        "mamba2 convolution": (mamba2.get("d_conv", 4), mamba2.get("use_conv_bias", True), mamba2.get("use_bias", False)),
        "bmojo q, k normed": "qwen3" in hf["model_type"] or bmojo.get("use_qk_norm", False),
    }


def test_gka_and_gdn_dicts_have_the_sizes_that_the_plugin_requires():
    for pattern, key in (("*-GKA", "gka_config"), ("*-GDN", "gdn_config")):
        written = config_to_hf(tiny_config(pattern))[key]
        assert {name: written[name] for name in OPTIONS} == OPTIONS


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_the_block_norms_are_served_with_the_eps_they_were_trained_with(eps):
    for pattern, mixer in (("*-GKA", "gka"), ("*-GDN", "gdn"), ("*-M2", "mamba2")):
        config = tiny_config(pattern, rms_norm_eps=eps)
        assert served(config_to_hf(config))[f"{mixer} block norms"] == eps
        if mixer != "mamba2":
            assert served(config_to_hf(config))[f"{mixer} output norm"] == config.options(KINDS[mixer].options).norm_eps
            assert plugin_notes(config) == []


def test_mamba2_is_served_with_its_own_sizes():
    got = served(config_to_hf(tiny_config("*-M2")))
    want = {"d_model": 24, "d_inner": 32, "d_xb": 16, "d_state": 8, "groups": 4, "B, C normed": True}
    assert {name: got[f"mamba2 {name}"] for name in want} == want
    assert got["mamba2 convolution"] == (4, True, False)
    written = config_to_hf(tiny_config("*-M2"))["mamba2_config"]
    assert (written["n_layer"], written["intermediate_size"], written["hidden_act"]) == (2, 40, "silu")
    assert written["ssm_cfg"]["expand"] == 1


def test_mamba2_of_a_source_without_qk_norms_is_served_without_them_and_comes_back_equal():
    config = tiny_config("*-M2", family="qwen2", qk_norm=False, qkv_bias=True)
    written = config_to_hf(config)
    assert served(written)["mamba2 B, C normed"] is False
    assert config_from_hf(written) == config


def test_the_mixer_inside_bmojo_has_its_dict_too_and_others_have_none():
    written = config_to_hf(tiny_config("*-BMF"))
    assert written["gka_config"]["num_q_heads"] == 4 and "mamba2_config" not in written
    assert {k: written["bmojo_config"][k] for k in ("num_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")} == {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
    }
    assert served(written)["bmojo q, k normed"]
    plain = config_to_hf(tiny_config("*-BMF", family="qwen2", qk_norm=False, qkv_bias=True))
    assert not served(plain)["bmojo q, k normed"]


def test_every_key_of_the_references_dicts_survives_except_default_eps():
    for kind in ("gdn", "gka"):
        theirs = json.loads((GOLDEN / "hmf_fused" / f"qwen3_{kind}" / "fused" / "config.json").read_text())
        ours = config_to_hf(config_from_hf(theirs))
        want = {k: v for k, v in theirs[f"{kind}_config"].items() if k != "norm_eps"}
        assert {k: ours[f"{kind}_config"].get(k) for k in want} == want


def test_harmless_keys_survive_the_round_trip():
    hf = config_to_hf(tiny_config("*-M2"))
    hf["mamba2_config"] |= {"chunk_size": 128, "xb_proj_rank": None, "dt_rank": None}
    again = config_to_hf(config_from_hf(hf))
    assert again["mamba2_config"] == hf["mamba2_config"]


@pytest.mark.parametrize(
    "pattern, key, values, words",
    [
        ("*-GKA", "gka_config", {"num_q_heads": 8}, r"gka_config.num_q_heads = 8 contradicts the model, where it is 4"),
        ("*-GDN", "gdn_config", {"head_dim": 16}, r"gdn_config.head_dim = 16 contradicts"),
        ("*-M2", "mamba2_config", {"d_xb": 32}, r"mamba2_config.d_xb = 32 contradicts the model, where it is 16"),
        ("*-M2", "mamba2_config", {"ssm_cfg": {"d_state": 64}}, r"mamba2_config.ssm_cfg.d_state = 64 contradicts"),
        ("*-M2", "mamba2_config", {"ssm_cfg": [8]}, r"mamba2_config.ssm_cfg = \[8\] contradicts"),
        ("*-M2", "mamba2_config", {"rms_norm_eps": 1e-5}, r"mamba2_config.rms_norm_eps = 1e-05 contradicts"),
        ("*-M2", "mamba2_config", {"d_conv": 3}, r"mamba2_config.d_conv = 3 is not supported; only 4 is"),
        ("*-M2", "mamba2_config", {"xb_proj_rank": 4}, r"mamba2_config.xb_proj_rank = 4 is not supported"),
        ("*-BMF", "bmojo_config", {"num_heads": 2}, r"bmojo_config.num_heads = 2 contradicts"),
        ("*-GKA", "gka_config", {"solver_type": "cg"}, r"gka_config.solver_type = 'cg' is not supported"),
    ],
)
def test_a_dict_that_contradicts_its_model_is_refused(pattern, key, values, words):
    hf = config_to_hf(tiny_config(pattern))
    with pytest.raises(ValueError, match=words):
        config_from_hf({**hf, key: {**hf[key], **values}})


@pytest.mark.parametrize(
    "pattern, changes, words",
    [
        ("*-GKA", dict(family="llama", qk_norm=False), "not of llama"),
        ("*DA-GKA*", {}, "fused"),
        ("GDN-GKA", {}, "gka and gdn in one model"),
        ("GDN-BMF", {}, "gka and gdn in one model"),
        ("*-GKA", dict(attention_windows=(5, None)), "sliding windows"),
        ("*-GDN", dict(gdn=GDNConfig(use_gate=False)), "GDN without gate"),
        ("*-GDN", dict(gdn=GDNConfig(norm_eps=1e-4)), "gdn_config.norm_eps = 0.0001"),
        ("*-GKA", dict(gka=GKAConfig(norm_eps=1e-4)), "gka_config.norm_eps = 0.0001"),
        ("*-M2", dict(rms_norm_eps=1e-5), "B and C are normed with rms_norm_eps = 1e-05"),
        ("*-GKA", dict(qkv_bias=True, o_bias=True), "output projection"),
        ("*-DM2", {}, "it has no Discrete Mamba-2"),
        ("*-M3", {}, "it has no Mamba-3"),
        ("*-GDN[1]", {}, "some heads of attention beside a mixer"),
        ("*-GDN", dict(gdn=GDNConfig(state_size=4)), "no state_size for gdn"),
        ("*-BMF", dict(bmojo=BMojoConfig(5, "gka")), "odd bmojo_config.window_size 5"),
    ],
)
def test_what_the_plugin_serves_differently_is_said(pattern, changes, words):
    (note,) = plugin_notes(tiny_config(pattern, **changes))
    assert words in note


def test_nothing_is_said_where_all_is_served():
    for config in (
        tiny_config("*-*", family="llama"),
        tiny_config("*-GKA-SWA-*", attention_windows=(None, None, None, None)),
        tiny_config("*-GKA", gka=GKAConfig(norm_eps=1e-5), rms_norm_eps=1e-5),
        tiny_config("*-M2", rms_norm_eps=1e-5, mamba2=Mamba2Config(use_qk_norm=False)),
        tiny_config("*-GKA", family="qwen3_moe", moe=MoEConfig(4, 2, 16)),
    ):
        assert plugin_notes(config) == []


def test_an_export_says_what_its_family_cannot_describe():
    with pytest.raises(ValueError, match="config.json of a llama cannot describe this model: attention_windows is"):
        config_to_hf(tiny_config("*-*", family="llama", qk_norm=False, attention_windows=(5, None)))
    with pytest.raises(ValueError, match="config.json of a qwen2 cannot describe this model: qk_norm is True"):
        config_to_hf(tiny_config("*-*", family="qwen2", qkv_bias=True))


@pytest.mark.parametrize("command", [export, convert])
def test_commands_that_write_a_hybrid_print_what_the_plugin_cannot_serve(command, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(GOLDEN / "hmf" / "llama_a_gdn"), str(tmp_path / "out")]))
    assert "the vLLM plugin of hybrid-model-factory: it serves hybrids of qwen2, qwen3, qwen3_moe only" in capsys.readouterr().out
