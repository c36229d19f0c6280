"""Primes the small Qwen3 of launch/tiny_qwen3 into a 50 % hybrid of any mixer, on a CPU, in a few minutes.

    python -m hybrid_jax prime --config=configs/prime_tiny.py:GKA --workdir=runs/gka

The word after the colon is the mixer's symbol: GKA, GDN, M2, SWA or another of `hybrid_jax.mixers`.
`./launch/quickstart.sh` runs this for GKA and SWA and prints what to expect.

Stages as in Priming (arXiv 2605.08301): select half of the layers by what sliding-window attention in their
place costs, initialize the mixers from attention, align (only the mixers train, towards the teacher's layer outputs
and final state), post-train (next token; all train).
The numbers are ours, chosen for two cores and ten minutes; the paper's recipes are far larger.
"""

from ml_collections import ConfigDict

from hybrid_jax.mixers import KINDS

MIXERS = {row.symbol: row for row in KINDS.values() if row.built and row.symbol != "*"}


def get_config(mixer: str = "GKA") -> ConfigDict:
    if mixer not in MIXERS:
        raise ValueError(f"prime_tiny knows {', '.join(MIXERS)}, got {mixer!r}")
    recurrent = MIXERS[mixer].recurrent
    align = {
        "form": "fused",
        "objective": "align_mixer",
        "options": {"inputs": "teacher", "pre_lm_head": False},
        "trainable": (rf"\.{MIXERS[mixer].parameter_key}\.",),
        "steps": 120,
        "batch_size": 4,
        "seq_len": 256,
        "optimizer": "adamw",
        # attention in windows starts from attention's own weights and needs small updates; the others start half from nothing
        "learning_rate": 5e-3 if recurrent else 2e-4,
        "schedule": "cosine",
        "final_fraction": 0.05,
        "warmup_steps": 10,
    }
    train = {
        "form": "unfused",
        "objective": "next_token",
        "trainable": ("all",),
        "answer_weight": 4.0,
        "steps": 40,
        "batch_size": 1,
        "seq_len": 1024,
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "schedule": "cosine",
        "final_fraction": 0.05,
        "warmup_steps": 5,
        "mix": {"text": 0.5, "needles": 0.3, "pairs": 0.2},
    }
    return ConfigDict(
        {
            "source": "launch/tiny_qwen3",
            "pattern": "",
            "fresh_parameters": "transformers",  # or "torch": how new convolutions and gates start
            "select": {"mixer": mixer, "fraction": 0.5, "window": 128, "rows": 4, "seq_len": 1024, "task": "needles"},
            # a window of so many keys and values in bfloat16 takes as many bytes as GKA's two states in float32:
            # 128 x 2 x 4 x 32 x 2 = 2 x 8 x 32 x 32 x 4
            "mixers": {"swa_config": {"window_size": 128}, "gka_config": {"num_iter": 10, "chunk_size": 32}},
            "schedule": ("align", "train"),
            "phases": {"align": align, "train": train},
            "data": {
                "text": "stdlib",
                "tasks": {"pairs": {"task": "retrieval", "min_pairs": 8, "max_pairs": 120}},
                "mix": {"text": 0.7, "retrieval": 0.2, "induction": 0.1},
            },
            "seed": 1,
        }
    )
