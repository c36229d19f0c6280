"""Which heads of a model retrieve: each head is removed in turn, and the heads' mixing matrices are read.

    hybrid-jax analyze heads --model source=launch/tiny_qwen3 --out runs/heads

The probes are those of Gather-and-Aggregate (arXiv 2504.18574): a dictionary of 20 and of 50 pairs, of which pairs are asked, and
multiple choice by letter; and needles in text. `heads` measures what is lost without a head; `mixing` how much a head gathers
facts on their last tokens, how much it aggregates them where they are asked, and how sharp its rows are, also as means by mixer.
The report has a picture of layer by head for each. It works for attention and for every recurrent mixer, and on any mesh (`mesh`).
The outcome for the small source is in analyze_heads.md.
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
    probe = {"seq_len": SEQ_LEN, "rows": ROWS}
    removed = {name: {"instrument": "heads", "task": name, **probe} for name in tasks}
    matrices = {f"mixing_{name}": {"instrument": "mixing", "task": name, **probe} for name in tasks}
    return ConfigDict({"data": {"text": "stdlib", "tasks": tasks}, "instruments": removed | matrices})
