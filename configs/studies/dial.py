"""Study: what do fewer, or more, iterations of Gated KalmaNet at inference cost, and what do they gain?

    hybrid-jax prime --config=configs/studies/mixers.py:GKA-50 --workdir=runs/studies/dial
    hybrid-jax evaluate --config configs/studies/dial.py:runs/studies/dial/model --out runs/studies/dial_report

One hybrid of the small source, primed as in configs/prime_tiny.py with Gated KalmaNet in layers 2, 3, 6 and 7 and 10 iterations, is
measured with 1 to 30 iterations in all of them, and with 4 in two of them: loss of held-out text, needles, pairs, and the speed of
reading and of decoding on this machine. No file of the model changes. The word after the colon is the model's directory.
The outcome is in dial.md.
"""

from ml_collections import ConfigDict

UNIFORM = (1, 2, 4, 8, 20, 30)
BY_LAYER = {"4 in layers 2 and 3": "2:4,3:4", "4 in layers 6 and 7": "6:4,7:4"}


def get_config(model: str = "runs/studies/dial/model") -> ConfigDict:
    settings = {f"{number} iterations": str(number) for number in UNIFORM} | BY_LAYER
    models = {name: {"path": model, "gka_iterations": iterations} for name, iterations in settings.items()}
    models |= {"10 as trained": {"path": model}, "source": {"path": "launch/tiny_qwen3"}}  # the first by name is compared with
    tasks = {"pairs": {"task": "retrieval", "min_pairs": 120, "max_pairs": 120}}
    instruments = {
        "text": {"instrument": "text", "seq_len": 1024, "rows": 16},
        "needles": {"instrument": "recall", "task": "needles", "seq_len": 1024, "rows": 32},
        "pairs": {"instrument": "recall", "task": "pairs", "seq_len": 1024, "rows": 16},
        "cost": {"instrument": "cost", "lengths": (1024, 131072)},
        "speed": {"instrument": "speed", "lengths": (512,), "new_tokens": 64, "repeats": 9},
    }
    return ConfigDict(
        {
            "data": {"text": "stdlib", "tasks": tasks},
            "instruments": instruments,
            "models": models,
        }
    )
