"""Study: which mixers can track a state, when they are trained from scratch?

    hybrid-jax sweep --config configs/studies/state_tracking.py:parity --out runs/studies/parity
    hybrid-jax sweep --config configs/studies/state_tracking.py:modular --out runs/studies/modular
    hybrid-jax sweep --config configs/studies/state_tracking.py:brackets --out runs/studies/brackets

One layer learns the parity of bits; three layers learn arithmetic modulo 5, with and without brackets. Mamba-3, Mamba-3 without its
rotation, Mamba-2, Gated DeltaNet and Gated DeltaNet with eigenvalues in [-1, 1] (the definitions and the comparison are those of
arXiv 2603.15569, section 4, and 2411.12537). Expressions grow in four phases, to 40 tokens; then those of up to 160 tokens are
measured too, which no mixer saw. Mamba-3's steps dt begin in [0.1, 1]: with the range for language, [0.001, 0.1], it begins with
turns of at most 18 degrees per token. Three seeds each. `configs/studies/state_tracking.py:parity-M3` is one experiment.
The outcome is in state_tracking.md.
"""

from ml_collections import ConfigDict

STEPS_OF_M3 = {"dt_min": 0.1, "dt_max": 1.0}
MIXERS = {
    "M3": ("M3", {"mamba3_config": STEPS_OF_M3}),
    "M3-fixed": ("M3", {"mamba3_config": {**STEPS_OF_M3, "rope_fraction": 0.0}}),
    "M2": ("M2", {}),
    "GDN": ("GDN", {}),
    "GDN-signed": ("GDN", {"gdn_config": {"allow_neg_eigval": True}}),
}
TASKS = {  # name: (layers, task)
    "parity": (1, {"task": "parity"}),
    "modular": (3, {"task": "modular_arithmetic"}),
    "brackets": (3, {"task": "modular_arithmetic", "brackets": True}),
}
PHASES = {  # most tokens of an expression, steps, learning rate
    "short": (8, 600, 5e-3),
    "middle": (14, 600, 5e-3),
    "long": (20, 800, 3e-3),
    "longest": (40, 2000, 2e-3),
}
MEASURED = (8, 20, 40, 60, 80, 160)


def get_config(which: str = "parity") -> ConfigDict:
    task, _, mixer = which.partition("-")
    if task not in TASKS or mixer not in ("", "evaluate", *MIXERS):
        known = f"TASK, TASK-evaluate and TASK-MIXER of {', '.join(TASKS)} and {', '.join(MIXERS)}"
        raise ValueError(f"state_tracking knows {known}, got {which!r}")
    if not mixer:
        configs, evaluate = ([f"configs/studies/state_tracking.py:{task}-{name}" for name in x] for x in (MIXERS, ["evaluate"]))
        return ConfigDict({"configs": tuple(configs), "grid": {"seed": (1, 101, 201)}, "evaluate": {"config": evaluate[0]}})
    layers, options = TASKS[task]
    if mixer == "evaluate":
        lengths = {"instrument": "recall", "task": task, "seq_len": 256, "grid": {"min_length,max_length": MEASURED}, "rows": 64}
        cost = {"instrument": "cost", "lengths": (256,)}
        return ConfigDict({"data": {"text": "stdlib", "tasks": {task: options}}, "instruments": {"length": lengths, "cost": cost}})
    symbol, mixers = MIXERS[mixer]
    least = 1 if task == "parity" else 3
    tasks = {phase: {**options, "min_length": least, "max_length": most} for phase, (most, *_) in PHASES.items()}
    phase = {
        "objective": "next_token",
        "batch_size": 16,
        "seq_len": 64,
        "optimizer": "adamw",
        "beta2": 0.98,
        "warmup_steps": 50,
        "schedule": "cosine",
        "final_fraction": 0.1,
        "log_every": 100,
    }
    model = {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    return ConfigDict(
        {
            "model": model,
            "pattern": "-".join([symbol] * layers),
            "fresh_parameters": "torch",
            "mixers": mixers,
            "schedule": tuple(PHASES),
            "phases": {
                name: {**phase, "steps": steps, "learning_rate": rate, "mix": {name: 1.0}}
                for name, (_, steps, rate) in PHASES.items()
            },
            "data": {"text": "stdlib", "tasks": tasks, "mix": {"longest": 1.0}},
            "seed": 1,
        }
    )
