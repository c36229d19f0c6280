"""Study: how many pairs does each mixer recall, when it is trained from scratch?

    hybrid-jax sweep --config configs/studies/mqar.py --out runs/studies/mqar

Two layers of one mixer learn multi-query associative recall (arXiv 2312.04927) of 4 to 64 pairs in rows of 256 tokens; then each
is asked for 8, 16, 32 and 64 pairs. Three seeds per mixer. `configs/studies/mqar.py:GKA` is the experiment of one mixer:
GKA, GDN, M2, LA (linear attention: Gated KalmaNet without solve and gates), SWA (a window of as many bytes as GKA's states),
or ATTENTION. It has not been run yet.
"""

from ml_collections import ConfigDict

# one layer's two heads of 32 dims: GKA keeps 2 x 2 x 32 x 32 float32 numbers, 16 KiB; so do 64 keys and values in bfloat16
MIXERS = {"ATTENTION": "*", "GKA": "GKA", "GDN": "GDN", "M2": "M2", "LA": "GKA", "SWA": "SWA"}
LINEAR = {"num_iter": 0, "use_forgetting_gate": False, "use_forgetting_gate_kk": False, "use_beta_gate": False}
ROWS = 256


def get_config(which: str = "sweep") -> ConfigDict:
    if which == "sweep":
        points = tuple(f"configs/studies/mqar.py:{mixer}" for mixer in MIXERS)
        evaluate = {"config": "configs/studies/mqar.py:evaluate"}
        return ConfigDict({"configs": points, "grid": {"seed": (1, 101, 201)}, "evaluate": evaluate})
    if which == "evaluate":
        grid = {"pairs": (8, 16, 32, 64)}
        recall = {"instrument": "recall", "task": "mqar", "seq_len": ROWS, "grid": grid, "rows": 64}
        cost = {"instrument": "cost", "lengths": (ROWS, 1024)}
        return ConfigDict({"data": {"text": "stdlib"}, "instruments": {"recall": recall, "cost": cost}})
    if which not in MIXERS:
        raise ValueError(f"mqar knows sweep, evaluate, {', '.join(MIXERS)}, got {which!r}")
    model = {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    train = {
        "objective": "next_token",
        "steps": 1000,
        "batch_size": 32,
        "seq_len": ROWS,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "final_fraction": 0.05,
        "weight_decay": 0.05,
        "log_every": 20,
        "checkpoint_every": 500,
    }
    gka = LINEAR if which == "LA" else {"num_iter": 10}
    return ConfigDict(
        {
            "model": model,
            "pattern": "-".join([MIXERS[which]] * 2),
            "fresh_parameters": "torch",
            "mixers": {"gka_config": {"chunk_size": 32, **gka}, "swa_config": {"window_size": 64}},
            "schedule": ("train",),
            "phases": {"train": train},
            "data": {
                "text": "stdlib",
                "tasks": {"mqar": {"task": "mqar", "min_pairs": 4, "max_pairs": 64}},
                "mix": {"mqar": 1.0},
            },
            "seed": 1,
        }
    )
