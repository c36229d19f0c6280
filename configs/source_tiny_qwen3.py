"""Trains the small Qwen3 that the quickstart primes: 6.6 M parameters, 8 layers, its own BPE of 4,096 tokens.

    python -m hybrid_jax train --config=configs/source_tiny_qwen3.py --workdir=runs/source_tiny_qwen3
    python -m hybrid_jax export runs/source_tiny_qwen3 OUT --dtype bfloat16

About two hours on two cores: rows of 128 tokens first, then of 256 with more weight on recall, then of 1,024 with recall at all
distances up to the row: needles in text, up to 120 pairs, a phonebook, repeated phrases; at last, needles that are a row's first
tokens. Text is the standard library of the Python that runs it, 5 % of the files held out. The outcome, with what to expect of
it, is launch/tiny_qwen3.
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
    short = {
        "objective": "next_token",
        "steps": 450,
        "batch_size": 32,
        "seq_len": 128,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "warmup_steps": 50,
        "schedule": "linear",
        "final_fraction": 0.6,
        "weight_decay": 0.05,
        "log_every": 10,
        "checkpoint_every": 100,
    }
    full = short | {
        "steps": 550,
        "batch_size": 16,
        "seq_len": 256,
        "learning_rate": 2.4e-3,
        "warmup_steps": 20,
        "final_fraction": 0.02,
        "answer_weight": 4.0,
        "mix": {"text": 0.5, "retrieval": 0.3, "induction": 0.2},
    }
    long = full | {
        "steps": 700,
        "batch_size": 4,
        "seq_len": 1024,
        "learning_rate": 1.6e-3,
        "checkpoint_every": 50,
        "mix": {"text": 0.4, "needles": 0.25, "pairs": 0.15, "phonebook": 0.1, "phrases": 0.1},
    }
    # a row's first tokens are the evidence of few answers: rows where they are, so that no place in the row is forgotten
    far = long | {
        "steps": 160,
        "learning_rate": 8e-4,
        "mix": {"text": 0.3, "needles": 0.15, "first": 0.25, "pairs": 0.15, "phonebook": 0.1, "phrases": 0.05},
    }
    tasks = {
        "pairs": {"task": "retrieval", "min_pairs": 8, "max_pairs": 120},
        "phonebook": {"task": "retrieval", "min_pairs": 4, "max_pairs": 60, "key_tokens": 3, "value_tokens": 4},
        "phrases": {"task": "induction", "min_period": 16, "max_period": 480},
        "first": {"task": "needles", "ask": "end", "depth": 0.0, "min_needles": 1, "max_needles": 4},
    }
    return ConfigDict(
        {
            "model": model,
            "schedule": ("short", "full", "long", "far"),
            "phases": {"short": short, "full": full, "long": long, "far": far},
            "data": {"text": "stdlib", "tasks": tasks, "mix": {"text": 0.6, "retrieval": 0.25, "induction": 0.15}},
            "seed": 0,
        }
    )
