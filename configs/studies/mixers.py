"""Study: what is lost when layers of the small source become each mixer, by the share of the layers?

    hybrid-jax sweep --config configs/studies/mixers.py --out runs/studies/mixers

The source (launch/tiny_qwen3) is primed as in configs/prime_tiny.py into Gated KalmaNet, Gated DeltaNet, Mamba-2, sliding windows
that hold as many bytes as Gated KalmaNet's states, and windows of twice as many, with 25, 50 and 75 % of the layers converted,
those that `select` finds cheapest; and trained on the same data without converting any. Three seeds.
`configs/studies/mixers.py:GKA-50` is one experiment. The outcome is in mixers.md.
"""

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config

# (symbol, tokens of a window); a layer's 128 keys and values in bfloat16 take as many bytes as GKA's two states in float32
MIXERS = {"GKA": ("GKA", 128), "GDN": ("GDN", 128), "M2": ("M2", 128), "SWA": ("SWA", 128), "SWA2": ("SWA", 256)}
# selected by `hybrid-jax prime --config=configs/prime_tiny.py:GKA --config.select.rows=32 --config.select.fraction=F`, F 0.25, 0.5,
# 0.75; X is the mixer
PATTERNS = {"25": "*-*-X-X-*-*-*-*", "50": "*-*-X-X-*-*-X-X", "75": "X-X-X-X-*-*-X-X"}
SAME = "same-data"


def get_config(which: str = "sweep") -> ConfigDict:
    points = [f"{mixer}-{share}" for share in PATTERNS for mixer in MIXERS]
    if which == "sweep":
        return ConfigDict(
            {
                "configs": tuple(f"configs/studies/mixers.py:{point}" for point in (SAME, *points)),
                "grid": {"seed": (1, 101, 201)},
                "evaluate": {"config": "configs/studies/mixers.py:evaluate", "models": {"source": "launch/tiny_qwen3"}},
            }
        )
    if which == "evaluate":
        return evaluation()
    if which not in (SAME, *points):
        raise ValueError(f"mixers knows sweep, evaluate, {SAME}, {', '.join(points)}, got {which!r}")
    mixer, _, share = which.partition("-")
    symbol, window = MIXERS.get(mixer, ("SWA", 128))
    config = load_config([f"--config=configs/prime_tiny.py:{symbol}"])
    config.pattern = PATTERNS.get(share, "*-*-*-*-*-*-*-*").replace("X", symbol)
    config.mixers.swa_config.window_size = window
    return config


def evaluation() -> ConfigDict:
    """Returns what is measured: text by position, needles by distance, one needle by length and depth, cost."""
    tasks = {"needle": {"task": "needles", "min_needles": 1, "max_needles": 1, "ask": "end"}}
    grid = {"seq_len": (512, 1024), "depth": (0.0, 0.25, 0.5, 0.75, 1.0)}
    instruments = {
        "text": {"instrument": "text", "seq_len": 1024, "rows": 16},
        "needles": {"instrument": "recall", "task": "needles", "seq_len": 1024, "rows": 32},
        "needle": {"instrument": "recall", "task": "needle", "grid": grid, "rows": 16},
        "cost": {"instrument": "cost", "lengths": (1024, 4096, 32768, 131072)},
    }
    return ConfigDict({"data": {"text": "stdlib", "tasks": tasks}, "instruments": instruments})
