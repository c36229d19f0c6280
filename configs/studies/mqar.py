"""Study: how many pairs does each mixer recall, when it is trained from scratch?

    hybrid-jax sweep --config configs/studies/mqar.py --out runs/studies/mqar

Two layers of one mixer first learn to continue repeated tokens, then multi-query associative recall (arXiv 2312.04927) of up to 8
and of up to 32 pairs; then each is asked for 4, 8, 16 and 32 pairs in rows of 128 tokens. Three seeds per mixer.
`configs/studies/mqar.py:GKA` is the experiment of one mixer: GKA, GDN, M2, LA (linear attention: Gated KalmaNet without solve and
gates), SWA (a window of as many bytes as GKA's states), or ATTENTION. Queries and keys have no norms: with them two layers of
attention of this size did not learn the task in as many steps.
The outcome is in mqar.md.
"""

from ml_collections import ConfigDict

# one layer's two heads of 16 dims: GKA keeps 2 x 2 x 16 x 16 float32 numbers, 4 KiB; so do 32 keys and values in bfloat16
MIXERS = {"ATTENTION": "*", "GKA": "GKA", "GDN": "GDN", "M2": "M2", "LA": "GKA", "SWA": "SWA"}
LINEAR = {"num_iter": 0, "use_forgetting_gate": False, "use_forgetting_gate_kk": False, "use_beta_gate": False}
SYMBOLS = 64  # half of them keys
TASKS = {
    "repeat": {"task": "induction", "min_period": 4, "max_period": 24, "symbols": SYMBOLS},
    "few": {"task": "mqar", "min_pairs": 2, "max_pairs": 8, "symbols": SYMBOLS},
    "many": {"task": "mqar", "min_pairs": 2, "max_pairs": 32, "symbols": SYMBOLS},
}
PHASES = {  # tokens of a row, steps of 1,024 tokens, schedule of the learning rate
    "repeat": (64, 1200, {"schedule": "constant"}),
    "few": (32, 1000, {"schedule": "constant"}),
    "many": (128, 1200, {"schedule": "cosine", "final_fraction": 0.1}),
}


def get_config(which: str = "sweep") -> ConfigDict:
    if which == "sweep":
        points = tuple(f"configs/studies/mqar.py:{mixer}" for mixer in MIXERS)
        evaluate = {"config": "configs/studies/mqar.py:evaluate"}
        return ConfigDict({"configs": points, "grid": {"seed": (1, 101, 201)}, "evaluate": evaluate})
    if which == "evaluate":
        grid = {"min_pairs,max_pairs": (4, 8, 16, 32)}
        recall = {"instrument": "recall", "task": "many", "seq_len": 128, "grid": grid, "rows": 64}
        cost = {"instrument": "cost", "lengths": (128, 1024)}
        return ConfigDict({"data": {"text": "stdlib", "tasks": TASKS}, "instruments": {"recall": recall, "cost": cost}})
    if which not in MIXERS:
        raise ValueError(f"mqar knows sweep, evaluate, {', '.join(MIXERS)}, got {which!r}")
    model = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    phase = {
        "objective": "next_token",
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "beta2": 0.98,
        "warmup_steps": 50,
        "weight_decay": 0.01,
        "log_every": 50,
    }
    phases = {
        name: {**phase, "seq_len": row, "batch_size": 1024 // row, "steps": steps, **schedule, "mix": {name: 1.0}}
        for name, (row, steps, schedule) in PHASES.items()
    }
    gka = LINEAR if which == "LA" else {"num_iter": 10}
    return ConfigDict(
        {
            "model": model,
            "pattern": "-".join([MIXERS[which]] * 2),
            "fresh_parameters": "torch",
            "mixers": {"gka_config": {"chunk_size": 32, **gka}, "swa_config": {"window_size": 32}},
            "schedule": tuple(PHASES),
            "phases": phases,
            "data": {"text": "stdlib", "tasks": TASKS, "mix": {"many": 1.0}},
            "seed": 1,
        }
    )
