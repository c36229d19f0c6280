"""Llama 3: llama3 RoPE scaling, optional biases (arXiv 2407.21783)."""

from hybrid_jax.families.base import Family


def _read(hf):
    bias = hf.get("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": hf.get("mlp_bias", False)}


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _read,
    lambda config: {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
    defaults={"max_position_embeddings": 2048},
)
