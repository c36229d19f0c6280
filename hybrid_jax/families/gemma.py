"""Gemma 3 text (arXiv 2503.19786): norms before and behind attention and MLP, scaled embeddings, windows with their own rope."""

from hybrid_jax.families.base import Family
from hybrid_jax.schema import integer, number, optional


def _read(hf):
    bias = hf["attention_bias"]
    return {
        "qk_norm": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "norms": "both",
        "norm_offset": 1.0,
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "activation": "gelu_tanh",
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
    """transformers' attention of Gemma 3 does not read the key, or reads it for other models than causal ones."""
    if value:
        raise ValueError(f"{name} = {value!r} is not supported; Gemma 3's causal attention has none: set it to null or false")


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _read,
    _write,
    window_keys=("sliding_window",),
    layer_types=True,
    windowed=lambda hf, layer: (layer + 1) % hf["sliding_window_pattern"] != 0,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    rope_theta=1_000_000.0,
    window_rope_theta=10_000.0,
    window_rope_key="rope_local_base_freq",
    keys={
        "query_pre_attn_scalar": number(above=0),
        "sliding_window_pattern": integer(1),
        "final_logit_softcapping": optional(number(above=0)),
        "attn_logit_softcapping": _absent,
        "use_bidirectional_attention": _absent,
    },
)
