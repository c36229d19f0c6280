"""Phi-1, Phi-1.5 and Phi-2 (phi; arXiv 2309.05463): attention and an MLP without a gate beside each other, behind one LayerNorm.

Every linear map has a bias, the output head too, and a part of each head is rotated. Phi-1.5 is MOHAWK's source (arXiv 2408.10189).
"""

from hybrid_jax.families.base import Family

PHI = Family(
    "phi",
    "PhiForCausalLM",
    lambda hf: {
        "norms": "parallel",
        "layer_norm": True,
        "gated_mlp": False,
        "qk_norm": hf["qk_layernorm"],
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True),
    },
    lambda config: {"qk_layernorm": config.qk_norm},
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "qk_layernorm": False},
    partial_rotary=True,
    names={
        "model.norm.": "model.final_layernorm.",
        ".self_attn.o_proj.": ".self_attn.dense.",
        ".self_attn.q_norm.": ".self_attn.q_layernorm.",
        ".self_attn.k_norm.": ".self_attn.k_layernorm.",
        ".mlp.up_proj.": ".mlp.fc1.",
        ".mlp.down_proj.": ".mlp.fc2.",
    },
    norm_eps_key="layer_norm_eps",
    activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
)
