"""Gemma 2 (arXiv 2408.00118) and Gemma 3 text (arXiv 2503.19786): norms before and behind attention and MLP, scaled embeddings.

Gemma 2 has soft caps of attention scores and logits, and a window in every second layer; Gemma 3 norms queries and keys, and its
windows have a rope of their own.
"""

from typing import Any

from hybrid_jax.families.base import Family
from hybrid_jax.schema import integer, number, optional


def _read(hf):
    bias = hf["attention_bias"]
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "norms": "both",
        "norm_offset": 1.0,
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "query_pre_attn_scalar": hf["query_pre_attn_scalar"],
        "logits_soft_cap": hf["final_logit_softcapping"],
    }


def _write(config):
    return {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "final_logit_softcapping": config.logits_soft_cap,
    }


def _absent(name, value):
    """Refuses a value of a key that transformers' attention of the family does not read, or reads where it is not causal."""
    if value:
        raise ValueError(f"{name} = {value!r} is not supported; the family's causal attention has none: set it to null or false")


_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": False,
}
_ACTIVATION: dict[str, Any] = dict(activation_key="hidden_activation", activations={"gelu_pytorch_tanh": "gelu_tanh"})
_KEYS = {
    "query_pre_attn_scalar": number(above=0),
    "final_logit_softcapping": optional(number(above=0)),
    "use_bidirectional_attention": _absent,
}

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    lambda hf: {**_read(hf), "attention_soft_cap": hf["attn_logit_softcapping"]},
    lambda config: {**_write(config), "attn_logit_softcapping": config.attention_soft_cap},
    window_keys=("sliding_window",),
    layer_types=True,
    windowed=lambda hf, layer: layer % 2 == 0,
    defaults={**_DEFAULTS, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    keys={**_KEYS, "attn_logit_softcapping": optional(number(above=0))},
    **_ACTIVATION,
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    lambda hf: {**_read(hf), "qk_norm": True},
    _write,
    window_keys=("sliding_window",),
    layer_types=True,
    windowed=lambda hf, layer: (layer + 1) % hf["sliding_window_pattern"] != 0,
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    rope_theta=1_000_000.0,
    window_rope_theta=10_000.0,
    window_rope_key="rope_local_base_freq",
    keys={**_KEYS, "sliding_window_pattern": integer(1), "attn_logit_softcapping": _absent},
    **_ACTIVATION,
)
