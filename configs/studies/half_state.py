"""Study: does Mamba-3 reach Mamba-2's loss with half of its state, when both are trained from scratch?

    hybrid-jax sweep --config configs/studies/half_state.py --out runs/studies/half_state

Four layers of Mamba-2 or Mamba-3 with states of 16 or 8 channels per head of 16 learn text, the claim of arXiv 2603.15569 (there
at 440 M parameters and with states of 128 and 64). Held-out loss by position and source is measured. Three seeds.
`configs/studies/half_state.py:M3-8` is one experiment.
The outcome is in half_state.md.
"""

from ml_collections import ConfigDict

MIXERS = {"M2": "mamba2_config", "M3": "mamba3_config"}
STATES = (16, 8)


def get_config(which: str = "sweep") -> ConfigDict:
    points = [f"{mixer}-{state}" for mixer in MIXERS for state in STATES]
    if which == "sweep":
        configs, evaluate = tuple(f"configs/studies/half_state.py:{p}" for p in points), "configs/studies/half_state.py:evaluate"
        return ConfigDict({"configs": configs, "grid": {"seed": (1, 101, 201)}, "evaluate": {"config": evaluate}})
    if which == "evaluate":
        text = {"instrument": "text", "seq_len": 512, "rows": 32}
        return ConfigDict(
            {"data": {"text": "stdlib"}, "instruments": {"text": text, "cost": {"instrument": "cost", "lengths": (512,)}}}
        )
    if which not in points:
        raise ValueError(f"half_state knows sweep, evaluate, {', '.join(points)}, got {which!r}")
    mixer, _, state = which.partition("-")
    model = {
        "model_type": "qwen3",
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    train = {
        "objective": "next_token",
        "steps": 700,
        "batch_size": 8,
        "seq_len": 256,
        "optimizer": "adamw",
        "learning_rate": 5e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "final_fraction": 0.05,
        "log_every": 50,
    }
    return ConfigDict(
        {
            "model": model,
            "pattern": "-".join([mixer] * 4),
            "fresh_parameters": "torch",
            "mixers": {MIXERS[mixer]: {"state_size": int(state)}},
            "schedule": ("train",),
            "phases": {"train": train},
            "data": {"text": "stdlib", "mix": {"text": 1.0}},
            "seed": 1,
        }
    )
