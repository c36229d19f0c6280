"""Qwen3, dense and mixture-of-experts: qk-norm, optional attention biases (arXiv 2505.09388)."""

from hybrid_jax.families.base import Family, read_moe, write_moe
from hybrid_jax.schema import integer

WINDOW_KEYS = ("sliding_window", "use_sliding_window")
WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def windowed(hf, layer):
    """The dense Qwen models keep full attention in the layers below max_window_layers."""
    return layer >= hf["max_window_layers"]


def _read(hf):
    bias = hf.get("attention_bias", False)
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _write(config):
    return {"attention_bias": config.qkv_bias}


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _read,
    _write,
    window_keys=WINDOW_KEYS,
    layer_types=True,
    windowed=windowed,
    defaults={"num_key_value_heads": 32, "head_dim": 128, **WINDOW_DEFAULTS},
    keys={"head_dim": integer()},
)
QWEN3_MOE = Family(  # in transformers its window is every layer's: it has neither max_window_layers nor layer_types
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    lambda hf: {**_read(hf), "moe": read_moe(hf)},
    lambda config: {**_write(config), **write_moe(config)},
    window_keys=WINDOW_KEYS,
    defaults={"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 4096},
)
