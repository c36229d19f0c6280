"""Phi-3, Phi-3.5 and Phi-4 (phi3): q, k, v in one tensor, gate and up in another, part of a head rotated, LongRoPE."""

from hybrid_jax.checks import check_choice
from hybrid_jax.families.base import Family
from hybrid_jax.schema import mapping, optional

_LONGROPE = {"su": "longrope", "yarn": "longrope"}  # its names in older config.json files


def _check_rope(name, value):
    rope = mapping(name, value)
    check_choice(f"{name}.rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "longrope", *_LONGROPE))
    return rope


def _fused(config):
    rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": rows, "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows},
        "mlp.gate_up_proj": dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size),
    }


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    window_keys=("sliding_window",),
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    keys=dict.fromkeys(("rope_scaling", "rope_parameters"), optional(_check_rope)),
    partial_rotary=True,
    rope_types=_LONGROPE,
    fused=_fused,
)
