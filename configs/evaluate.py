"""What `hybrid-jax evaluate` measures where no other config is given.

    hybrid-jax evaluate --model source=launch/tiny_qwen3 --run mine=runs/mine --out runs/report

Held-out text (loss, perplexity, bits per byte; loss by position), recall of key-value pairs and of needles in text by the
distance to the evidence, and what a sequence costs in bytes. Copy it to add instruments (`hybrid_jax.evaluate.instruments`),
tasks (`hybrid_jax.data.tasks`) or a mesh.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"text": "stdlib", "tasks": {"pairs": {"task": "retrieval", "min_pairs": 16, "max_pairs": 16}}},
            "instruments": {
                "text": {"instrument": "text", "seq_len": 1024, "rows": 64},
                "pairs": {"instrument": "recall", "task": "pairs", "seq_len": 1024, "rows": 16},
                "needles": {"instrument": "recall", "task": "needles", "seq_len": 1024, "rows": 64},
                "cost": {"instrument": "cost", "lengths": (1024, 4096, 16384, 65536, 131072)},
            },
        }
    )
