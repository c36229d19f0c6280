"""Public source models by name: their config.json, for plans that need no download.

From the models' published config.json files.
"""

from __future__ import annotations

from typing import Any


def _qwen3(hidden, inner, layers, heads, tied=False, **more) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        **more,
    }


def _llama3(hidden, inner, layers, heads, scaling: float | None = None, tied=False) -> dict[str, Any]:
    scaled = {
        "rope_type": "llama3",
        "factor": scaling,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": scaled if scaling else None,
        "max_position_embeddings": 131072 if scaling else 8192,
        "tie_word_embeddings": tied,
    }


def _mistral(hidden, inner, layers, vocab, theta, context, **more) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "max_position_embeddings": context,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **more,
    }


_EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


_NEXT = {
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "rope_theta": 10_000_000,
    "max_position_embeddings": 262144,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}


def _llama4(experts, context, step, **more) -> dict[str, Any]:
    return {
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_local_experts": experts,
        "interleave_moe_layer_step": step,
        "no_rope_layers": [],
        "max_position_embeddings": context,
        **more,
    }


_SCOUT_ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _phi(hidden, layers, **more) -> dict[str, Any]:
    return {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.5,
        **more,
    }


def _phi3(hidden, inner, layers, heads, kv_heads, vocab, context, **more) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "original_max_position_embeddings": context,
        **more,
    }


PUBLIC: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _qwen3(2048, 6144, 48, 32, **_EXPERTS),
    "Qwen/Qwen3-235B-A22B": _qwen3(4096, 12288, 94, 64, **{**_EXPERTS, "moe_intermediate_size": 1536}),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _NEXT,
    "meta-llama/Meta-Llama-3-8B": _llama3(4096, 14336, 32, 32),
    "meta-llama/Meta-Llama-3-70B": _llama3(8192, 28672, 80, 64),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 8.0),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28672, 80, 64, 8.0),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 32.0, tied=True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 32.0, tied=True),
    "meta-llama/Llama-4-Scout-17B-16E": _llama4(16, 262144, 1, rope_scaling=_SCOUT_ROPE),
    "meta-llama/Llama-4-Maverick-17B-128E": _llama4(128, 1048576, 2, use_qk_norm=False),
    "mistralai/Mistral-7B-v0.1": _mistral(4096, 14336, 32, 32000, 10_000.0, 32768, sliding_window=4096),
    "mistralai/Mistral-7B-v0.3": _mistral(4096, 14336, 32, 32768, 1_000_000.0, 32768),
    "mistralai/Mistral-Nemo-Base-2407": _mistral(5120, 14336, 40, 131072, 1_000_000.0, 131072),
    "mistralai/Mixtral-8x7B-v0.1": _mistral(4096, 14336, 32, 32000, 1_000_000.0, 32768, model_type="mixtral", num_local_experts=8),
    "HuggingFaceTB/SmolLM3-3B": {
        "model_type": "smollm3",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_theta": 5_000_000.0,
        "max_position_embeddings": 65536,
    },
    "allenai/OLMo-2-1124-7B": {
        "model_type": "olmo2",
        "vocab_size": 100352,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 4096,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "google/gemma-3-1b-pt": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    "microsoft/phi-1_5": _phi(2048, 24),
    "microsoft/phi-2": _phi(2560, 32, partial_rotary_factor=0.4),
    "microsoft/Phi-3-mini-4k-instruct": _phi3(3072, 8192, 32, 32, 32, 32064, 4096, rope_theta=10_000.0, sliding_window=2047),
    "microsoft/phi-4": _phi3(5120, 17920, 40, 40, 10, 100352, 16384, rope_theta=250_000.0),
    "mistralai/Mistral-Small-24B-Base-2501": _mistral(5120, 32768, 40, 131072, 100_000_000.0, 32768),
}
