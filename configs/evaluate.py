"""What `hybrid-jax evaluate` measures where no other config is given.

    hybrid-jax evaluate --model source=launch/tiny_qwen3 --run mine=runs/mine --out runs/report

Held-out text (loss, perplexity, bits per byte; loss by position), recall of key-value pairs and of needles in text by the
distance to the evidence, what a sequence costs in bytes, and tokens per second on this machine. Copy it to add instruments
(`hybrid_jax.evaluate.instruments`), tasks (`hybrid_jax.data.tasks`) or a mesh. `--config=configs/evaluate.py:mesh` leaves out the
speed, which is measured on one device.
"""

from ml_collections import ConfigDict


def get_config(where: str = "") -> ConfigDict:
    if where not in ("", "mesh"):
        raise ValueError(f"evaluate knows mesh, got {where!r}")
    instruments = {
        "text": {"instrument": "text", "seq_len": 1024, "rows": 64},
        "pairs": {"instrument": "recall", "task": "pairs", "seq_len": 1024, "rows": 16},
        "needles": {"instrument": "recall", "task": "needles", "seq_len": 1024, "rows": 64},
        "cost": {"instrument": "cost", "lengths": (1024, 4096, 16384, 65536, 131072)},
    }
    if where != "mesh":
        instruments["speed"] = {"instrument": "speed", "lengths": (512,)}
    return ConfigDict(
        {
            "data": {"text": "stdlib", "tasks": {"pairs": {"task": "retrieval", "min_pairs": 16, "max_pairs": 16}}},
            "instruments": instruments,
        }
    )
