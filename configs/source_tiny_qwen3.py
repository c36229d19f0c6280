"""Trains the small Qwen3 that the quickstart primes (shipped as tests/../data: see its card).

python -m hybrid_jax train --config=configs/source_tiny_qwen3.py --workdir=runs/source_tiny_qwen3
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    model = {
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    pretrain = {
        "objective": "next_token",
        "steps": 1200,
        "batch_size": 16,
        "seq_len": 256,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "warmup_steps": 50,
        "schedule": "linear",
        "final_fraction": 0.02,
        "weight_decay": 0.05,
        "log_every": 10,
        "checkpoint_every": 100,
    }
    return ConfigDict(
        {
            "model": model,
            "schedule": ("pretrain",),
            "phases": {"pretrain": pretrain},
            "data": {"text": "stdlib", "mix": {"text": 0.7, "retrieval": 0.2, "induction": 0.1}},
            "seed": 0,
        }
    )
