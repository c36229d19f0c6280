"""Llama 4 text: experts beside a shared one, chunks of attention in layers with rotary embeddings, scaled queries in the others.

A token goes to the experts with the largest scores, one in the released models, and what they read is multiplied by the sigmoids
of the scores.
"""

import dataclasses

from hybrid_jax.config import ModelConfig
from hybrid_jax.families.base import Family, expert_counts, read_moe
from hybrid_jax.families.smollm3 import rotary_layers


def _rotary_layers(hf) -> tuple[bool, ...]:
    """As in SmolLM3; an empty `no_rope_layers` means the same as none."""
    return rotary_layers({**hf, "no_rope_layers": hf["no_rope_layers"] or None})


def _moe_layers(hf) -> list[int]:
    """`moe_layers`; absent: every `interleave_moe_layer_step`th layer."""
    step, listed = hf["interleave_moe_layer_step"], hf["moe_layers"]
    return list(range(step - 1, hf["num_hidden_layers"], step)) if listed is None else listed


def _read(hf):
    bias, width, experts = hf["attention_bias"], hf["intermediate_size"], _moe_layers(hf)
    moe = read_moe({**hf, "moe_intermediate_size": width, "norm_topk_prob": False}, num_experts=16)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm_rotated": hf["use_qk_norm"],
        "chunked_windows": True,
        "rotate_halves": False,
        "rotary_layers": _rotary_layers(hf),
        "unrotated_query_scaling": (hf["attn_scale"], hf["floor_scale"]) if hf["attn_temperature_tuning"] else None,
        "dense_layers": tuple(i not in experts for i in range(hf["num_hidden_layers"])),
        "moe": dataclasses.replace(
            moe, shared_intermediate_size=width, shared_gate=False, sigmoid_router=True, weighted_inputs=True
        ),
    }


def _write(config: ModelConfig):
    scaling = config.unrotated_query_scaling
    return {
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm_rotated,
        "no_rope_layers": [int(rotary) for rotary in config.rotary_layers],
        "attn_temperature_tuning": scaling is not None,
        **dict(zip(("attn_scale", "floor_scale"), scaling or (), strict=False)),
        "moe_layers": [i for i, dense in enumerate(config.dense_layers) if not dense],
        "intermediate_size": config.moe.intermediate_size if config.moe else None,
        **expert_counts(config, "num_local_experts"),
    }


LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    _read,
    _write,
    window_keys=("attention_chunk_size",),
    window_type="chunked_attention",
    layer_types=True,
    windowed=lambda hf, layer: _rotary_layers(hf)[layer],
    defaults={
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "moe_layers": None,
    },
    rope_theta=500_000.0,
    names={".mlp.gate.": ".mlp.router.", ".mlp.": ".feed_forward."},
    stacked_experts=True,
    intermediate_key="intermediate_size_mlp",
    ignored=("vision_model.", "multi_modal_projector."),
    wrapper="llama4",
    wrapped={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
