"""Study: how much does it matter which layers are converted?

    hybrid-jax sweep --config configs/studies/layers.py --out runs/studies/layers

Half of the small source's layers become Gated KalmaNet, Gated DeltaNet, Mamba-2, or sliding windows that hold as many bytes: the
four layers in which a window costs least (what `select` chooses), every other layer, and the four in which a window costs most,
which are those that retrieve. Primed and measured as in mixers.py; three seeds. `configs/studies/layers.py:GKA-cheapest` is one
experiment. The outcome is in layers.md.
"""

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config

MIXERS = ("GKA", "GDN", "M2", "SWA")
PATTERNS = {"cheapest": "*-*-X-X-*-*-X-X", "alternate": "*-X-*-X-*-X-*-X", "costliest": "X-X-*-*-X-X-*-*"}  # X is the mixer


def get_config(which: str = "sweep") -> ConfigDict:
    points = [f"{mixer}-{choice}" for choice in PATTERNS for mixer in MIXERS]
    if which == "sweep":
        return ConfigDict(
            {
                "configs": tuple(f"configs/studies/layers.py:{point}" for point in points),
                "grid": {"seed": (1, 101, 201)},
                "evaluate": {"config": "configs/studies/mixers.py:evaluate", "models": {"source": "launch/tiny_qwen3"}},
            }
        )
    if which not in points:
        raise ValueError(f"layers knows sweep, {', '.join(points)}, got {which!r}")
    mixer, _, choice = which.partition("-")
    config = load_config([f"--config=configs/prime_tiny.py:{mixer}"])
    config.pattern = PATTERNS[choice].replace("X", mixer)
    return config
