"""Mistral (one window for every layer), Ministral (a window for some) and Ministral 3 (YaRN, scaled queries)."""

from hybrid_jax.families.base import Family

_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def _ministral3_rope(hf):
    return {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


MISTRAL = Family("mistral", "MistralForCausalLM", window_keys=("sliding_window",), defaults=_DEFAULTS)
MINISTRAL = Family("ministral", "MinistralForCausalLM", window_keys=("sliding_window",), layer_types=True, defaults=_DEFAULTS)
MINISTRAL3 = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    window_keys=("sliding_window",),
    defaults={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
    },
    rope=_ministral3_rope,
)
