"""The pattern language and the model's description."""

import pytest

from hybrid_jax.config import ATTENTION, GKAConfig, MixerSpec, format_pattern, mixer_config_from_dict, parse_pattern
from hybrid_jax.families import config_from_hf, config_to_hf
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    "pattern", ["*", "*-GKA-GDN-M2-SWA-BMF", "GKA*-*DA-GDN*-M2*-SWA*-BMF*", "GDN>GKA-*DA", "GDN[3,17]-*-M3", "GKA[0]*"]
)
def test_a_pattern_is_read_and_written_back_unchanged(pattern):
    assert format_pattern(parse_pattern(pattern)) == pattern


def test_symbols_say_who_teaches_whom():
    fused, dual, pair, heads = parse_pattern("GKA*-*DA-GDN>GKA-GDN[3,17]")
    assert fused == MixerSpec("gka", teacher=ATTENTION)
    assert dual.shared and dual.kinds == (ATTENTION,)
    assert pair == MixerSpec("gka", teacher="gdn")
    assert heads.attention_heads == (3, 17)


@pytest.mark.parametrize(
    "pattern, layer, symbol",
    [
        ("*-GKB", 1, "GKB"),
        ("*-", 1, ""),
        ("gka", 0, "gka"),
        ("*-*-**", 2, "**"),
        ("GKA>GKA", 0, "GKA>GKA"),
        ("*>GKA", 0, "*>GKA"),
        ("GDN[]", 0, "GDN[]"),
        ("GDN[3,,4]", 0, "GDN[3,,4]"),
        ("GDN[4,3]", 0, "GDN[4,3]"),
        ("GDN[3,3]", 0, "GDN[3,3]"),
        ("*[1]", 0, "*[1]"),
        ("SWA[1]", 0, "SWA[1]"),
        ("GKA-GKA*DA", 1, "GKA*DA"),
        ("GDN>", 0, "GDN>"),
        ("GDN>*DA", 0, "GDN>*DA"),
    ],
)
def test_an_invalid_symbol_is_refused_naming_layer_and_symbol(pattern, layer, symbol):
    with pytest.raises(ValueError) as e:
        parse_pattern(pattern)
    assert f"layer {layer}" in str(e.value) and repr(symbol) in str(e.value)


def test_a_pattern_of_the_wrong_length_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"3 symbols.*4 layers"):
        parse_pattern("*-*-GKA", 4)


def test_a_kept_head_that_the_model_has_not_is_refused_with_its_layer():
    assert tiny_config("*-GDN[3]").layers[1].attends
    with pytest.raises(ValueError, match=r"layer 1: 'GDN\[4\]' keeps head 4; the model has heads 0 to 3"):
        tiny_config("*-GDN[4]")


def test_fusing_and_unfusing_are_inverse():
    config = tiny_config("*-GKA-SWA")
    assert config.fused().pattern == "*DA-GKA*-SWA*"
    assert config.fused().unfused() == config


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(num_kv_heads=3), "num_key_value_heads"),
        (dict(head_dim=7), "head_dim"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(attention_windows=(None,) * 3), "attention_windows"),
    ],
)
def test_an_impossible_model_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        tiny_config("*-GKA", **changes)


def test_unknown_and_unsupported_mixer_options_are_refused():
    with pytest.raises(ValueError, match="gka_config has the unknown option 'num_iters'"):
        mixer_config_from_dict("gka_config", {"num_iters": 3})
    with pytest.raises(ValueError, match="gdn_config.kv_proj_rank must be an integer at least 1"):
        mixer_config_from_dict("gdn_config", {"kv_proj_rank": 0})
    with pytest.raises(ValueError, match="gka_config.num_sketches_per_head = 2 is not supported; only 1 is"):
        mixer_config_from_dict("gka_config", {"num_sketches_per_head": 2})
    with pytest.raises(ValueError, match="use_forgetting_gate_kk = false is supported only without the solve, with num_iter = 0"):
        mixer_config_from_dict("gka_config", {"use_forgetting_gate_kk": False})
    assert mixer_config_from_dict("gka_config", {"hidden_size": 64, "num_iter": 3}).num_iter == 3


def test_the_solver_of_gka_is_kept_and_told_only_where_it_is_not_the_checkpoints():
    model = tiny_config("*-GKA")
    assert config_to_hf(model)["gka_config"].keys().isdisjoint({"solver"})
    told = config_to_hf(model.with_options(GKAConfig(solver="cg")))["gka_config"]
    assert (told["solver"], told["solver_type"], told["num_iter"]) == ("cg", "chebyshev", 30)
    assert mixer_config_from_dict("gka_config", told) == GKAConfig(solver="cg")
    with pytest.raises(ValueError, match="gka_config.solver must be one of 'chebyshev', 'cg', got 'newton'"):
        GKAConfig(solver="newton")


def test_the_precision_of_gka_is_kept_and_told_only_where_it_is_not_the_usual():
    model = tiny_config("*-GKA")
    assert "precision" not in config_to_hf(model)["gka_config"]
    accurate = model.with_options(GKAConfig(precision="accurate"))
    assert config_to_hf(accurate)["gka_config"]["precision"] == "accurate"
    assert config_from_hf(config_to_hf(accurate)).mixers == accurate.mixers
    with pytest.raises(ValueError, match="gka_config.precision must be one of 'fast', 'accurate', got 'exact'"):
        GKAConfig(precision="exact")
