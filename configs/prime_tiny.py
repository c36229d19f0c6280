"""Primes the small Qwen3 of launch/tiny_qwen3 into a 50 % hybrid of any mixer, on a CPU, in a few minutes.

    python -m hybrid_jax prime --config=configs/prime_tiny.py:GKA --workdir=runs/gka

The word after the colon is the mixer's symbol: GKA, GDN, M2, SWA or another of `hybrid_jax.mixers`.
`./launch/quickstart.sh` runs this for GKA and SWA and prints what to expect.

Stages as in Priming (arXiv 2605.08301): select half of the layers by what sliding-window attention in their
place costs on text and on needles, initialize the mixers from attention, align (only the mixers train), post-train (next
token; all train). Alignment is layer by layer on the source's states (MOHAWK's second stage, arXiv 2408.10189), which takes
a third of the time of the paper's on two cores. Windows start from attention's own weights and are not aligned.
The numbers are ours, chosen for two cores and a few minutes; the paper's recipes are far larger.
"""

from ml_collections import ConfigDict

from hybrid_jax.mixers import KINDS

MIXERS = {row.symbol: row for row in KINDS.values() if row.symbol != "*"}


def get_config(mixer: str = "GKA") -> ConfigDict:
    if mixer not in MIXERS:
        raise ValueError(f"prime_tiny knows {', '.join(MIXERS)}, got {mixer!r}")
    align = {
        "form": "fused",
        "objective": "align_mixer",
        "options": {"inputs": "teacher", "pre_lm_head": False},
        "trainable": (rf"\.{MIXERS[mixer].parameter_key}\.",),
        "steps": 60,
        "batch_size": 4,
        "seq_len": 256,
        "optimizer": "adamw",
        "learning_rate": 5e-3,
        "schedule": "cosine",
        "final_fraction": 0.05,
        "warmup_steps": 5,
    }
    train = {
        "form": "unfused",
        "objective": "next_token",
        "trainable": ("all",),
        "answer_weight": 4.0,
        "steps": 10,
        "batch_size": 2,
        "seq_len": 1024,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "final_fraction": 0.05,
        "warmup_steps": 2,
        "mix": {"text": 0.5, "needles": 0.3, "pairs": 0.2},
    }
    return ConfigDict(
        {
            "source": "launch/tiny_qwen3",
            "pattern": "",
            "fresh_parameters": "transformers",  # or "torch": how new convolutions and gates start
            "copy_attention": True,  # False: recurrent mixers start as in a new model
            "select": {"mixer": mixer, "fraction": 0.5, "window": 128, "rows": 8, "seq_len": 1024, "task": "needles"},
            # a window of so many keys and values in bfloat16 takes as many bytes as GKA's two states in float32:
            # 128 x 2 x 4 x 32 x 2 = 2 x 8 x 32 x 32 x 4
            "mixers": {"swa_config": {"window_size": 128}, "gka_config": {"num_iter": 10, "chunk_size": 32}},
            "schedule": ("align", "train") if MIXERS[mixer].recurrent else ("train",),
            "phases": {"align": align, "train": train},
            "data": {
                "text": "stdlib",
                "tasks": {"pairs": {"task": "retrieval", "min_pairs": 8, "max_pairs": 120}},
                "mix": {"text": 0.7, "retrieval": 0.2, "induction": 0.1},
            },
            "seed": 1,
        }
    )
