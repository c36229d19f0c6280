"""Qwen3, dense and mixture-of-experts: qk-norm, optional attention biases (arXiv 2505.09388)."""

from hybrid_jax.families.base import Family, read_moe


def _read(hf):
    bias = hf.get("attention_bias", False)
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _window(hf, layer):
    return bool(hf.get("use_sliding_window") and hf.get("sliding_window") and layer >= hf.get("max_window_layers", 28))


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read, _window, {"head_dim": 128})
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", lambda hf: {**_read(hf), "moe": read_moe(hf)}, lambda hf, layer: False)
