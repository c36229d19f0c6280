"""Qwen2 and Qwen2.5: biases on q, k, v (arXiv 2407.10671)."""

from hybrid_jax.families.base import Family
from hybrid_jax.families.qwen3 import WINDOW_DEFAULTS, WINDOW_KEYS, windowed

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    lambda hf: {"qkv_bias": True},
    window_keys=WINDOW_KEYS,
    layer_types=True,
    windowed=windowed,
    defaults={"num_key_value_heads": 32, **WINDOW_DEFAULTS},
)
