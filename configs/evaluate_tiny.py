"""What the quickstart measures of the small model and of its hybrids, in rows of 1,024 tokens.

    hybrid-jax evaluate --model source=launch/tiny_qwen3 --config configs/evaluate_tiny.py:full --out runs/source_report

`quick` (the default, some seconds per model on two CPU cores): held-out text, needles in text, and cost. `full` reads more
rows and adds one needle by length and depth, a phonebook, repeated phrases, and many pairs; minutes per model.
"""

from ml_collections import ConfigDict


def get_config(which: str = "quick") -> ConfigDict:
    if which not in ("quick", "full"):
        raise ValueError(f"evaluate_tiny knows quick and full, got {which!r}")
    tasks = {
        "needle": {"task": "needles", "min_needles": 1, "max_needles": 1, "ask": "end"},
        "pairs": {"task": "retrieval", "min_pairs": 120, "max_pairs": 120},
        "phonebook": {"task": "retrieval", "min_pairs": 60, "max_pairs": 60, "key_tokens": 3, "value_tokens": 4},
        "phrases": {"task": "induction", "min_period": 480, "max_period": 480},
    }
    rows, needles = {"quick": (8, 16), "full": (64, 64)}[which]
    instruments = {
        "text": {"instrument": "text", "seq_len": 1024, "rows": rows},
        "needles": {"instrument": "recall", "task": "needles", "seq_len": 1024, "rows": needles},
        "cost": {"instrument": "cost", "lengths": (1024, 4096, 16384, 65536, 131072)},
    }
    if which == "full":
        grid = {"seq_len": (256, 512, 1024), "depth": (0.0, 0.25, 0.5, 0.75, 1.0)}
        instruments["needle"] = {"instrument": "recall", "task": "needle", "grid": grid, "rows": 32}
        for name in ("pairs", "phonebook", "phrases"):
            instruments[name] = {"instrument": "recall", "task": name, "seq_len": 1024, "rows": 16}
    return ConfigDict({"data": {"text": "stdlib", "tasks": tasks}, "instruments": instruments})
