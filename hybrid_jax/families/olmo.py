"""OLMo 2 and 3: norms behind attention and MLP, queries and keys normed over all heads; OLMo 3 has windows in most layers."""

from hybrid_jax.families.base import Family


def _read(hf):
    bias = hf.get("attention_bias", False)
    return {"qk_norm": True, "qk_norm_all_heads": True, "norms": "behind", "qkv_bias": bias, "o_bias": bias}


def _write(config):
    return {"attention_bias": config.qkv_bias}


_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}

OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read, _write, defaults=_DEFAULTS)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _read,
    _write,
    window_keys=("sliding_window",),
    layer_types=True,
    windowed=lambda hf, layer: (layer + 1) % 4 != 0,
    defaults={**_DEFAULTS, "sliding_window": 4096},
    rope_theta=500_000.0,
    window_rope_theta=500_000.0,
)
