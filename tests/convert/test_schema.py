"""Wrong values in config.json: each is refused with a ValueError that names its key, before anything is built."""

import dataclasses
import json
import tracemalloc

import pytest

from hybrid_jax.config import BMojoConfig, GDNConfig, GKAConfig, MoEConfig, RopeConfig, SWAConfig
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.mixers import options_by_key
from hybrid_jax.schema import KEYS
from tests.conftest import tiny_config

NAN, INF = float("nan"), float("inf")
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA = dict(SIZES, model_type="llama", head_dim=8)
MOE = dict(SIZES, model_type="qwen3_moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
HYBRID = dict(SIZES, model_type="hybrid_qwen3", head_dim=8, hybrid_override_pattern="GKA-BMF")
NEVER = ["3", "abc", -2, 1.5, [1.5], {"a": {"b": 1}}, NAN, INF, -INF, "[[[[", [[]], 10**12]  # right for no key...
ALLOWED = {  # ... but these
    "rope_theta": [1.5, 10**12],
    "hybrid_override_pattern": [],
    "ridge_strength": [1.5, 10**12],
    "decay_floor": [1.5, 10**12],
    "factor": [1.5, 10**12],
    "low_freq_factor": [1.5],
    "high_freq_factor": [1.5, 10**12],
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), [1.5, 10**12]),
    "llama_4_scaling_beta": [1.5, 10**12],
    "attn_scale": [1.5, 10**12],
}


def refused(hf, name, value):
    try:
        config_from_hf(hf)
    except ValueError as e:
        assert name in str(e), f"{name}={value!r}: {e}"
        return True
    return False


def base_of(key):
    if key in options_by_key() or key in ("hybrid_override_pattern", "attention_windows"):
        return HYBRID
    return MOE if any(word in key for word in ("expert", "moe", "mlp_only", "sparse", "topk")) else LLAMA


@pytest.mark.parametrize("key", [*KEYS, *options_by_key()])
def test_a_wrong_value_of_any_key_is_refused_by_name(key):
    name = {"hybrid_override_pattern": "hybrid", "rope_scaling": "rope"}.get(key, key)
    for value in NEVER:
        if value not in ALLOWED.get(key, []):
            assert refused({**base_of(key), key: value}, name, value), (key, value)


@pytest.mark.parametrize("key", options_by_key())
def test_a_wrong_value_of_any_mixer_option_is_refused_by_name(key):
    for name in options_by_key()[key].checks():
        for value in NEVER:
            if value not in ALLOWED.get(name, []):
                assert refused({**HYBRID, key: {name: value}}, name, value), (key, name, value)


def test_a_wrong_value_of_any_rope_option_is_refused_by_name():
    llama3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    yarn = dict(rope_type="yarn", factor=4.0)
    names = ["rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    more = ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "llama_4_scaling_beta"]
    longrope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=4.0)
    of_longrope = ["short_factor", "long_factor", "factor", "attention_factor", "partial_rotary_factor", "rope_type"]
    for rope, options in ((llama3, names), (yarn, more), (longrope, of_longrope)):
        for name in options:
            for value in NEVER:
                if value not in ALLOWED.get(name, []):
                    assert refused({**LLAMA, "rope_parameters": {**rope, name: value}}, name, value), (name, value)


@pytest.mark.parametrize(
    "hf, words",
    [
        ([], r"config.json must be an object .*, got \[\]"),
        (None, r"config.json must be an object .*, got None"),
        ({**LLAMA, "tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({**LLAMA, "tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got None"),
        ({**LLAMA, "sliding_window": 0}, "sliding_window must be an integer at least 1"),
        ({**LLAMA, "sliding_window": True}, "sliding_window must be an integer at least 1"),
        ({**LLAMA, "rms_norm_eps": 0}, "rms_norm_eps must be a number above 0 and below 1, got 0"),
        ({**LLAMA, "rope_theta": -5.0}, "rope_theta must be a number above 1, got -5.0"),
        ({**LLAMA, "num_key_value_heads": 0}, "num_key_value_heads must be an integer at least 1"),
        ({**LLAMA, "head_dim": None, "num_attention_heads": 64}, "head_dim must be an integer at least 1"),
        ({**LLAMA, "model_type": "qwen3", "head_dim": None}, "head_dim must be an integer"),
        ({**LLAMA, "attention_dropout": NAN}, "config.json: attention_dropout must be finite, got nan"),
        ({**LLAMA, "layer_types": "sliding_attention"}, "layer_types must be a list"),
        ({**LLAMA, "layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 2"),
        ({**LLAMA, "layer_types": []}, "layer_types has 0 entries, num_hidden_layers is 2"),
        ({**HYBRID, "attention_windows": []}, "attention_windows has 0 entries, num_hidden_layers is 2"),
        ({**HYBRID, "attention_windows": [None, 0]}, r"attention_windows\[1\] must be an integer"),
        ({**HYBRID, "hybrid_override_pattern": []}, "hybrid_override_pattern must name the mixer of every layer"),
        ({**HYBRID, "gka_config": []}, "gka_config must be an object"),
        ({**HYBRID, "gka_config": {"use_gate": "false"}}, "gka_config.use_gate must be true or false, got 'false'"),
        ({**HYBRID, "gka_config": {"kv_learnable_residual": 0}}, "kv_learnable_residual must be true or false, got 0"),
        ({**HYBRID, "gka_config": {"conv_bias": 0}}, "gka_config.conv_bias = 0 is not supported; only False is"),
        ({**MOE, "num_experts_per_tok": 0}, "num_experts_per_tok must be an integer at least 1"),
        ({**MOE, "num_experts_per_tok": 5}, r"num_experts_per_tok must be at most num_experts \(4\), got 5"),
        ({**LLAMA, "intermediate_size": 0}, "intermediate_size = 0 is not supported: with transformers' keys, .* give its width"),
        ({**HYBRID, "intermediate_size": 0}, "intermediate_size = 0 is not supported: .* which hybrids have too"),
        ({**MOE, "num_local_experts": 8}, r"num_experts and num_local_experts contradict each other: \[4, 8\]"),
        ({**MOE, "decoder_sparse_step": 0}, "mix dense and expert layers"),
        ({**LLAMA, "eos_token_id": "2"}, "eos_token_id must be an integer"),
    ],
)
def test_the_message_names_the_key_what_was_expected_and_what_came(hf, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf(hf)


def test_a_billion_layers_are_refused_without_allocating():
    tracemalloc.start()
    with pytest.raises(ValueError, match="num_hidden_layers must be an integer at least 1 and at most 10000, got 1000000000"):
        config_from_hf({**LLAMA, "num_hidden_layers": 10**9})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_every_option_has_a_rule_and_options_made_in_python_follow_it():
    for cls in (*options_by_key().values(), MoEConfig):
        assert {f.name for f in dataclasses.fields(cls)} == cls.checks().keys()
    for make, word in (
        (lambda: GKAConfig(num_iter=-1), "gka_config.num_iter"),
        (lambda: GKAConfig(ridge_strength=-1.0), "gka_config.ridge_strength"),
        (lambda: GDNConfig(norm_eps=NAN), "gdn_config.norm_eps"),
        (lambda: SWAConfig(0), "swa_config.window_size"),
        (lambda: BMojoConfig(4, "swa"), "bmojo_config.ssm_mixer"),
        (lambda: MoEConfig(4, 5, 16), "num_experts_per_tok"),
        (lambda: RopeConfig(1e4, "linear"), "lack factor"),
        (lambda: RopeConfig(NAN), "rope_theta"),
        (lambda: tiny_config("*", rms_norm_eps=INF), "rms_norm_eps"),
        (lambda: tiny_config("*", tie_embeddings="false"), "tie_word_embeddings"),
        (lambda: tiny_config("*", attention_windows=(-1,)), "attention_windows"),
        (lambda: tiny_config("*", num_kv_heads=None), "num_key_value_heads"),
        (lambda: tiny_config("*", intermediate_size=-1), "intermediate_size must be an integer at least 0"),
        (
            lambda: tiny_config("*", intermediate_size=0, moe=MoEConfig(4, 2, 16)),
            "intermediate_size = 0 means layers without an MLP",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            make()


@pytest.mark.parametrize("base", [LLAMA, MOE, HYBRID], ids=["llama", "moe", "hybrid"])
def test_what_is_written_is_json_and_is_read_back_equal(base):
    config = config_from_hf(base)
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config
    assert config_to_hf(config_from_hf(written)) == written
