"""config.json as transformers' own config classes read it: defaults, windows, rope parameters and their precedence."""

import copy
import logging

import numpy as np
import pytest
import transformers

pytest.importorskip("torch")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybrid_jax.families import FAMILIES, config_from_hf, config_to_hf
from hybrid_jax.layers.rope import rope_frequencies
from tests.conftest import relative_error

CLASSES = {
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "qwen3_next": transformers.Qwen3NextConfig,
    "qwen3_5_text": transformers.Qwen3_5TextConfig,
    "qwen3_5_moe_text": transformers.Qwen3_5MoeTextConfig,
    "qwen2": transformers.Qwen2Config,
    "llama": transformers.LlamaConfig,
    "llama4_text": transformers.Llama4TextConfig,
    "mistral": transformers.MistralConfig,
    "ministral": transformers.MinistralConfig,
    "ministral3": transformers.Ministral3Config,
    "smollm3": transformers.SmolLM3Config,
    "phi": transformers.PhiConfig,
    "phi3": transformers.Phi3Config,
    "mixtral": transformers.MixtralConfig,
    "olmo2": transformers.Olmo2Config,
    "olmo3": transformers.Olmo3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}
NEXT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
SIZES = dict(vocab_size=97, hidden_size=512, intermediate_size=80, num_hidden_layers=3, num_attention_heads=32)
SMALL = dict(SIZES, head_dim=16, num_key_value_heads=8, max_position_embeddings=256)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position_embeddings=64)
MIXED = ["full_attention", "sliding_attention", "full_attention"]
QUERY_SCALING = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def theirs(model_type, **keys):
    return CLASSES[model_type].from_dict(copy.deepcopy({"model_type": model_type, **keys}))  # it writes into its rope dicts


def ours(model_type, **keys):
    return config_from_hf({"model_type": model_type, **keys})


def their_windows(config):
    """As the modeling files choose a layer's mask."""
    if config.model_type in ("llama", "olmo2", "phi", *NEXT):
        return (None,) * config.num_hidden_layers
    if config.model_type == "llama4_text":
        return tuple(config.attention_chunk_size if t == "chunked_attention" else None for t in config.layer_types)
    by_layer = config.model_type in ("qwen2", "qwen3", "ministral", "smollm3", "olmo3", "gemma2", "gemma3_text")
    types = config.layer_types if by_layer else ["sliding_attention"] * 3
    return tuple(config.sliding_window if t == "sliding_attention" else None for t in types)


def their_frequencies(config, head_dim, layer_type=None):
    rope = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if rope["rope_type"] == "default":
        head_dim = int(head_dim * rope.get("partial_rotary_factor", 1))
        return rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim), 1.0
    inverse, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", layer_type=layer_type)
    return inverse.numpy(), factor


def check_rope(model_type, **keys):
    a, b = ours(model_type, **{**SMALL, **keys}), theirs(model_type, **{**SMALL, **keys})
    got, factor = rope_frequencies(a.rope, 16, a.max_position_embeddings)
    want, wanted_factor = their_frequencies(b, 16)
    assert relative_error(got, want) < 1e-6 and abs(factor - wanted_factor) < 1e-9
    return a, b


def test_every_family_has_its_class_here():
    assert CLASSES.keys() == {name for name, family in FAMILIES.items() if family.own_layout is None}


@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_keys_mean_what_they_mean_to_transformers(model_type):
    a, b = ours(model_type, **SIZES), theirs(model_type, **SIZES)
    fields = {
        "num_kv_heads": b.num_key_value_heads,
        "head_dim": getattr(b, "head_dim", None) or 512 // 32,
        "rms_norm_eps": b.layer_norm_eps if model_type == "phi" else b.rms_norm_eps,
        "max_position_embeddings": b.max_position_embeddings,
        "tie_embeddings": b.tie_word_embeddings,
        "initializer_range": b.initializer_range,
        "attention_windows": their_windows(b),
        "rotary_layers": tuple(map(bool, getattr(b, "no_rope_layers", [1] * 3))),
    }
    assert {name: getattr(a, name) for name in fields} == fields
    gelu, silu = ("hidden_activation", "gelu_pytorch_tanh", "gelu_tanh"), ("hidden_act", "silu", "silu")
    act = gelu if model_type.startswith("gemma") else ("hidden_act", "gelu_new", "gelu_tanh") if model_type == "phi" else silu
    soft_caps = [getattr(b, f"{x}_logit_softcapping", None) for x in ("attn", "final")]
    assert [a.attention_soft_cap, a.logits_soft_cap] == soft_caps
    assert (getattr(b, act[0]), a.extra[act[0]], a.activation) == (act[1], act[1], act[2])
    always = model_type == "phi"  # it has every bias, and no key for them
    assert (a.o_bias, a.mlp_bias) == (getattr(b, "attention_bias", always), getattr(b, "mlp_bias", always))
    rope = dict(b.rope_parameters)
    types = {t: r for t, r in (("full_attention", a.rope), ("sliding_attention", a.window_rope)) if t in rope} or {None: a.rope}
    assert (a.window_rope is None) == (None in types)
    for layer_type, mine in types.items():
        of_type = rope if layer_type is None else rope[layer_type]
        assert (mine.theta, mine.kind) == (of_type["rope_theta"], of_type["rope_type"])
        got, factor = rope_frequencies(mine, a.head_dim, a.max_position_embeddings)
        want, wanted_factor = their_frequencies(b, a.head_dim, layer_type)
        assert relative_error(got, want) < 1e-6 and factor == wanted_factor
    beta = rope.get("llama_4_scaling_beta")
    assert a.query_scaling == (None if beta is None else (beta, rope["original_max_position_embeddings"]))
    if a.moe is not None:
        experts = b.num_experts if model_type in NEXT else b.num_local_experts
        assert (a.moe.num_experts, a.moe.experts_per_token) == (experts, b.num_experts_per_tok)
        shared = b.intermediate_size if model_type == "llama4_text" else getattr(b, "shared_expert_intermediate_size", None)
        assert a.moe.shared_intermediate_size == shared
        own = model_type in ("mixtral", "llama4_text")  # they have neither key: their experts have the width `intermediate_size`
        normed = {"mixtral": True, "llama4_text": False, "qwen3_5_moe_text": True}.get(model_type)
        assert a.moe.intermediate_size == (b.intermediate_size if own else b.moe_intermediate_size)
        assert a.moe.norm_topk_prob == (b.norm_topk_prob if normed is None else normed)


def test_gemma_2_has_a_second_key_for_its_activation_which_nothing_reads_and_the_export_keeps():
    config = ours("gemma2", **SIZES, hidden_act="gelu_pytorch_tanh")
    assert config.activation == "gelu_tanh" and config_to_hf(config)["hidden_act"] == "gelu_pytorch_tanh"
    assert "hidden_act" not in config_to_hf(ours("gemma2", **SIZES))


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize(
    "keys",
    [
        dict(sliding_window=9, use_sliding_window=True, max_window_layers=1),
        dict(sliding_window=9, use_sliding_window=True, max_window_layers=0, layer_types=MIXED),
        dict(use_sliding_window=True, max_window_layers=2),
        dict(sliding_window=None),
        dict(sliding_window=9, use_sliding_window=False, max_window_layers=0),
    ],
    ids=["from layer 1", "layer_types", "default window", "no window", "switched off"],
)
def test_windows_are_transformers(model_type, keys):
    refusals = dict.fromkeys(NEXT, rf"layer_types\[1\] = 'sliding_attention' is not supported; a layer of a {model_type}")
    refusals["llama4_text"] = "layer 0: 'full_attention' is not a known symbol"
    if model_type in refusals and "layer_types" in keys:
        with pytest.raises(ValueError, match=refusals[model_type]):
            ours(model_type, **SMALL, **keys)
        return
    want = their_windows(theirs(model_type, **SMALL, **keys))
    config = ours(model_type, **SMALL, **keys)
    assert config.attention_windows == want
    written = config_to_hf(config)
    assert their_windows(CLASSES[model_type].from_dict(written)) == want
    assert config_from_hf(written) == config


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope_theta=777.0),
        dict(rope_parameters={"rope_type": "default"}, rope_theta=777.0),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 777.0}, rope_scaling=YARN),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 777.0}, rope_scaling={}, rope_theta=777.0),
        dict(rope_parameters={"rope_theta": 777.0, **YARN}, rope_scaling={"type": "linear", "factor": 3.0, "rope_theta": 888.0}),
        dict(rope_scaling={"type": "linear", "factor": 3.0}, rope_theta=777.0),
        dict(rope_scaling={"type": "yarn", "rope_type": "linear", "factor": 3.0}),
        dict(rope_parameters={k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}),
        dict(rope_parameters=YARN, original_max_position_embeddings=32),
        dict(rope_parameters={**YARN, "factor": None}),
        dict(rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
        dict(rope_parameters={**YARN, "mscale": 0.7}),
        dict(rope_parameters={**YARN, "attention_factor": 1.7}),
        dict(rope_parameters={**YARN, "beta_fast": 16, "beta_slow": 2.5}),
        dict(rope_parameters={**YARN, "beta_fast": 0, "beta_slow": 0.25, "truncate": False}),
        dict(rope_parameters={**YARN, "beta_fast": 2, "beta_slow": 2, "truncate": False}),
        dict(rope_parameters={**YARN, "original_max_position_embeddings": 4}),
        dict(rope_parameters=LLAMA3, rope_theta=5e5),
        dict(rope_parameters={**LLAMA3, "high_freq_factor": LLAMA3["low_freq_factor"]}, rope_theta=5e5),
        dict(rope_parameters={k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}, rope_theta=5e5),
    ],
    ids=str,
)
def test_rope_precedence_and_frequencies_are_transformers(keys):
    for model_type in ("llama", "ministral3"):
        a, _ = check_rope(model_type, **keys)
        assert config_from_hf(config_to_hf(a)) == a


def test_ministral3_scales_its_queries_under_either_key():
    for key in ("rope_parameters", "rope_scaling"):
        a, b = check_rope("ministral3", **{key: QUERY_SCALING})
        assert a.query_scaling == (b.rope_parameters["llama_4_scaling_beta"], 16)
        assert config_from_hf(config_to_hf(a)).query_scaling == (0.3, 16)
    assert ours("llama", **SMALL, rope_parameters=QUERY_SCALING).query_scaling is None


@pytest.mark.parametrize("start", [dict(rope_theta=777.0), dict(rope_parameters=LLAMA3, rope_theta=5e5)], ids=["default", "llama3"])
def test_an_edit_of_our_export_has_the_same_effect_here_and_in_transformers(start):
    written = config_to_hf(ours("llama", **SMALL, **start))
    before = rope_frequencies(ours("llama", **SMALL, **start).rope, 16, 256)[0]
    for edit in (
        {"rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": written["rope_theta"]}},
        {"rope_parameters": {**written["rope_parameters"], "rope_theta": 999.0}, "rope_theta": 999.0},
    ):
        a, _ = check_rope("llama", **{k: v for k, v in {**written, **edit}.items() if k != "model_type"})
        assert relative_error(rope_frequencies(a.rope, 16, 256)[0], before) > 1e-2
    with pytest.raises(ValueError, match=r"rope_theta is 999.0, and (777|500000).0 among the rope parameters"):
        config_from_hf({**written, "rope_theta": 999.0})


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}}), "per layer type are not supported"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type must be one of"),
        (dict(rope_scaling={"rope_type": None, "type": "linear", "factor": 2.0}), "rope_type must be one of"),
        (dict(rope_scaling={"rope_type": "linear"}), "lack factor"),
        (dict(rope_scaling={k: v for k, v in YARN.items() if k != "factor"}), "lack factor"),
        (dict(rope_scaling={**LLAMA3, "high_freq_factor": 1.4}), "high_freq_factor must be at least low_freq_factor"),
        (dict(rope_scaling={**LLAMA3, "factor": None}), "factor must be a number above 0, got None"),
        (dict(rope_scaling={**YARN, "truncate": "no"}), "truncate must be true or false"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
        (dict(rope_parameters={"rope_theta": 0}), "rope_theta must be a number above 1, got 0"),
        (dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 2]}), "mrope_section is not supported"),
    ],
)
def test_rope_parameters_that_cannot_be_honoured_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        ours("qwen3", **SMALL, **keys)


def test_the_window_of_a_named_layer_must_be_set():
    with pytest.raises(ValueError, match="'sliding_attention' but sliding_window and use_sliding_window set no window"):
        ours("qwen2", **SMALL, sliding_window=9, layer_types=["sliding_attention"] * 3)


@pytest.mark.parametrize(
    "keys",
    [
        dict(no_rope_layer_interval=2),
        dict(no_rope_layer_interval=1),
        dict(no_rope_layers=[1, 0, 0, 1], no_rope_layer_interval=2),  # entries beyond the last layer say nothing
        dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9),
        dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9, layer_types=MIXED[1:] + MIXED[:1]),
    ],
    ids=str,
)
def test_layers_of_smollm3_without_rope_and_their_windows_are_transformers(keys):
    config, want = ours("smollm3", **SMALL, **keys), theirs("smollm3", **SMALL, **keys)
    for a, b in ((config, want), (config_from_hf(config_to_hf(config)), CLASSES["smollm3"].from_dict(config_to_hf(config)))):
        assert a.rotary_layers == tuple(map(bool, b.no_rope_layers[:3])) and a.attention_windows == their_windows(b)
    assert config.rope_of(0) is (config.rope if want.no_rope_layers[0] else None)


def test_every_layer_of_smollm3_must_say_whether_it_has_rope():
    with pytest.raises(ValueError, match="no_rope_layers has 2 entries, num_hidden_layers is 3"):
        ours("smollm3", **SMALL, no_rope_layers=[1, 1])


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(tie_word_embeddings=True), "tie_word_embeddings = true is not supported where the output head has a bias"),
        (dict(hidden_act="relu"), "hidden_act must be one of 'gelu_new', 'gelu_pytorch_tanh', got 'relu'"),
        (dict(qk_layernorm=1), "qk_layernorm must be true or false"),
        (dict(layer_norm_eps=0), "layer_norm_eps must be a number above 0"),
    ],
)
def test_what_phi_cannot_be_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        ours("phi", **SMALL, **keys)


FACTORS = dict(short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[1.0, 2.0, 4.0, 9.5])  # of 8 channels


@pytest.mark.parametrize(
    "keys",
    [
        dict(
            partial_rotary_factor=0.5,
            original_max_position_embeddings=32,
            rope_scaling={"type": "su", "original_max_position_embeddings": 32, **FACTORS},
            rope_theta=777.0,
        ),
        dict(rope_scaling={"type": "yarn", "partial_rotary_factor": 0.5, **FACTORS}, original_max_position_embeddings=32),
        dict(rope_parameters={"rope_type": "longrope", "partial_rotary_factor": 0.5, "factor": 9.0, **FACTORS}),
        dict(rope_parameters={"rope_type": "longrope", "partial_rotary_factor": 0.5, "attention_factor": 1.7, **FACTORS}),
        dict(
            partial_rotary_factor=0.25,  # the one among the rope parameters comes first
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 8, **FACTORS,
            },
        ),
    ],
    ids=str,
)  # fmt: skip
def test_longrope_of_phi3_is_transformers(keys):
    a, b = ours("phi3", **SMALL, **keys), theirs("phi3", **SMALL, **keys)
    assert a.rope.number("original_max_position_embeddings") == b.rope_parameters["original_max_position_embeddings"]
    for long in (False, True):
        got, factor = rope_frequencies(a.rope, 16, a.max_position_embeddings, long=long)
        want, wanted = ROPE_INIT_FUNCTIONS["longrope"](b, "cpu", seq_len=10_000 if long else 1)
        assert relative_error(got, want.numpy()) < 1e-6 and abs(factor - wanted) < 1e-9
    written = config_to_hf(a)
    assert config_from_hf(written) == a
    again = CLASSES["phi3"].from_dict(copy.deepcopy(written))
    assert again.rope_parameters == {name: value for name, value in b.rope_parameters.items() if name != "type"}


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.rope_type must be one of 'default', 'longrope'"),
        (dict(rope_parameters={"rope_type": "longrope", **FACTORS}), "short_factor must have 8 entries, .* got 4"),
        (dict(rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 8}), "lack long_factor"),
        (
            dict(rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": ["1"] * 8}),
            r"long_factor\[0\] must be a number",
        ),
        (dict(partial_rotary_factor=0.2), "partial_rotary_factor 0.2 rotates 3 of 16 channels"),
        (dict(partial_rotary_factor=0.01), "partial_rotary_factor 0.01 rotates 0 of 16 channels"),
    ],
)
def test_rope_parameters_of_phi3_that_cannot_be_honoured_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        ours("phi3", **SMALL, **keys)


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope_scaling=YARN, rope_theta=500_000.0),
        dict(rope_parameters=dict(full_attention=YARN, sliding_attention=dict(rope_type="linear", factor=3.0, rope_theta=777.0))),
        dict(rope_parameters=dict(full_attention={**LLAMA3, "rope_theta": 99.0}), rope_scaling=dict(factor=4.0)),
        dict(rope_parameters=dict(sliding_attention=dict(rope_theta=777.0)), rope_theta=99.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.window_rope_theta])
def test_rope_parameters_of_layers_with_and_without_a_window_are_transformers(model_type, keys):
    config, want = ours(model_type, **SMALL, **keys), theirs(model_type, **SMALL, **keys)
    again = CLASSES[model_type].from_dict(copy.deepcopy(config_to_hf(config)))
    assert config_from_hf(config_to_hf(config)) == config
    for layer_type, rope in (("full_attention", config.rope), ("sliding_attention", config.window_rope)):
        got, factor = rope_frequencies(rope, 16, config.max_position_embeddings)
        for wanted in (want, again):
            inverse, wanted_factor = their_frequencies(wanted, 16, layer_type)
            assert relative_error(got, inverse) < 1e-6 and abs(factor - wanted_factor) < 1e-9


@pytest.mark.parametrize(
    "model_type, keys, words",
    [
        ("olmo3", dict(rope_theta=777.0), "rope_theta = 777.0 without rope_parameters means other bases"),
        ("olmo3", dict(rope_parameters=dict(rope_type="default")), "an object for each of full_attention and sliding_attention"),
        ("gemma2", dict(attn_logit_softcapping=-1.0), "attn_logit_softcapping must be"),
        ("gemma3_text", dict(attn_logit_softcapping=30.0), "attn_logit_softcapping = 30.0 is not supported"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True is not supported"),
        ("gemma3_text", dict(hidden_activation="relu"), "hidden_activation must be"),
        ("gemma3_text", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar must be"),
        ("olmo3", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
        ("olmo3", dict(rope_parameters=dict(sliding_attention=dict(rope_type="dynamic"))), "rope_type must be one of"),
    ],
)
def test_rope_parameters_per_layer_type_that_cannot_be_honoured_are_refused(model_type, keys, words):
    with pytest.raises(ValueError, match=words):
        ours(model_type, **SMALL, **keys)
