"""Mixtral: Mistral with a mixture of experts in every layer, whose router is normalized (arXiv 2401.04088)."""

from hybrid_jax.families.base import Family, expert_counts, read_moe


def _read(hf):
    experts = {"moe_intermediate_size": hf["intermediate_size"], "norm_topk_prob": True}
    return {"moe": read_moe({**hf, **experts}, num_experts=8)}


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read,
    lambda config: expert_counts(config, "num_local_experts"),
    window_keys=("sliding_window",),
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    rope_theta=1_000_000.0,
    names={
        ".mlp.": ".block_sparse_moe.",
        ".gate_proj.": ".w1.",
        ".down_proj.": ".w2.",
        ".up_proj.": ".w3.",
    },
)
