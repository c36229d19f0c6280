"""Which heads of a model retrieve: each head is removed in turn, and what is lost is measured.

    hybrid-jax evaluate --model source=launch/tiny_qwen3 --config configs/analyze_heads.py --out runs/heads

The probes are those of Gather-and-Aggregate (arXiv 2504.18574): a dictionary of 20 and of 50 pairs, of which pairs are asked, and
multiple choice by letter; and needles in text. The report has a picture of layer by head for each. It works for attention and
for every recurrent mixer, and on any mesh (`mesh`).
"""

from ml_collections import ConfigDict

SEQ_LEN, ROWS = 512, 32


def get_config() -> ConfigDict:
    tasks = {
        "pairs_20": {"task": "retrieval", "min_pairs": 20, "max_pairs": 20},
        "pairs_50": {"task": "retrieval", "min_pairs": 50, "max_pairs": 50},
        "letters": {"task": "letter_choice"},
        "needle": {"task": "needles", "min_needles": 1, "max_needles": 1, "ask": "end"},
    }
    instruments = {name: {"instrument": "heads", "task": name, "seq_len": SEQ_LEN, "rows": ROWS} for name in tasks}
    return ConfigDict({"data": {"text": "stdlib", "tasks": tasks}, "instruments": instruments})
