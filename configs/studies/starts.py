"""Study: what are attention's weights worth to a new mixer, and does Mamba-3 gain from them as the others do?

    hybrid-jax sweep --config configs/studies/starts.py --out runs/studies/starts

Half of the layers of the small source become Gated DeltaNet, Mamba-2 or Mamba-3, which begin with attention's weights (stage 0)
or as in a new model; then all are primed and measured as in mixers.py. The recipe for Mamba-3 is ours (`Mamba3.from_attention`): no
paper has one. Three seeds. `configs/studies/starts.py:M3-new` is one experiment.
The outcome is in starts.md.
"""

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config

MIXERS, STARTS = ("GDN", "M2", "M3"), ("attention", "new")
PATTERN = "*-*-X-X-*-*-X-X"  # as in mixers.py at 50 %


def get_config(which: str = "sweep") -> ConfigDict:
    points = [f"{mixer}-{start}" for mixer in MIXERS for start in STARTS]
    if which == "sweep":
        return ConfigDict(
            {
                "configs": tuple(f"configs/studies/starts.py:{point}" for point in points),
                "grid": {"seed": (1, 101, 201)},
                "evaluate": {"config": "configs/studies/mixers.py:evaluate", "models": {"source": "launch/tiny_qwen3"}},
            }
        )
    if which not in points:
        raise ValueError(f"starts knows sweep, {', '.join(points)}, got {which!r}")
    mixer, _, start = which.partition("-")
    config = load_config([f"--config=configs/prime_tiny.py:{mixer}"])
    config.pattern, config.copy_attention = PATTERN.replace("X", mixer), start == "attention"
    return config
