"""Study: how far beyond its training length does a hybrid recall, when it reads a context in chunks and composes them?

    hybrid-jax sweep --config configs/studies/composition.py --out runs/studies/composition

The small source becomes a hybrid of Gated KalmaNet, Gated DeltaNet, Mamba-2 or Discrete Mamba-2, primed as in prime_tiny.py, in
rows of 1,024 tokens. Then one needle is asked for in rows of 1,024, 2,048 and 4,096 tokens, by an ordinary pass, by the nine
published compositions and by the exact one of the states (hybrid_jax/composition). Three seeds per mixer.
`configs/studies/composition.py:GKA` is the experiment of one mixer, `:trial` the smallest evaluation of a model.
The outcome is in composition.md.
"""

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config

MIXERS = ("GKA", "GDN", "M2", "DM2")
TRAINED, LONGEST = 1024, 4096  # tokens of a row
COMPOSITIONS = (
    "concat:soup", "concat:fuse", "concat:kv_only", "concat:exact",
    "full:soup", "full:fuse", "full:kv_only", "full:ordinary",
    "sw:soup", "sw:fuse", "sw:kv_only", "sw:exact",
)  # fmt: skip
TASKS = {"needle": {"task": "needles", "min_needles": 1, "max_needles": 1, "ask": "end"}}


def evaluation(lengths: tuple[int, ...], rows: int, compositions: tuple[str, ...]) -> ConfigDict:
    values = {"task": "needle", "lengths": lengths, "rows": rows, "compositions": compositions, "chunk": TRAINED}
    instruments = {
        "composed": {"instrument": "composed_recall", **values},
        "cost": {"instrument": "cost", "lengths": (TRAINED, LONGEST)},
    }
    return ConfigDict({"data": {"text": "stdlib", "tasks": TASKS}, "instruments": instruments})


def get_config(which: str = "sweep") -> ConfigDict:
    if which == "sweep":
        points = tuple(f"configs/studies/composition.py:{mixer}" for mixer in MIXERS)
        evaluate = {"config": "configs/studies/composition.py:evaluate"}
        return ConfigDict({"configs": points, "grid": {"seed": (1, 101, 201)}, "evaluate": evaluate})
    if which == "evaluate":
        return evaluation((TRAINED, 2 * TRAINED, LONGEST), 32, COMPOSITIONS)
    if which == "trial":
        return evaluation((2 * TRAINED,), 2, ("concat:soup", "sw:fuse"))
    if which not in MIXERS:
        raise ValueError(f"composition knows sweep, evaluate, trial, {', '.join(MIXERS)}, got {which!r}")
    config = load_config([f"--config=configs/prime_tiny.py:{which}"])
    longer = {name: {"max_position_embeddings": LONGEST} for name in ("align", "train")}  # so that every stage can be measured
    config.update({"phases": longer})
    return config
