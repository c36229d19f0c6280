"""Study: how much retrieval do a few heads of attention keep, when their layers become recurrent?

    hybrid-jax sweep --config configs/studies/kept_heads.py --out runs/studies/kept_heads

Layers 2 to 7 of the small source become Mamba-2, beside no, 1, 2, 3 or 6 of their 48 heads (0 to 12 %), as in retrieval-aware
distillation (arXiv 2602.11374). The heads are those with the largest share of the evidence in their rows (analyze_heads.md), in
that order. Merged by the sum; with 3 heads also as published. With 0, 3 and 6 heads also with states 8 times smaller. Primed and
measured as in mixers.py; three seeds. `configs/studies/kept_heads.py:3` is one experiment, `small-3` has the small state.
The outcome is in kept_heads.md.
"""

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config

LAYERS, CONVERTED = 8, range(2, 8)
HEADS = ((4, 1), (5, 0), (5, 6), (5, 7), (4, 0), (5, 1))  # (layer, head), by the share of the evidence of 50 pairs
POINTS = ("0", "1", "2", "3", "6", "published-3", "small-0", "small-3", "small-6")


def pattern_with(count: int) -> str:
    """Returns the pattern in which the first `count` of the heads stay attention."""

    def symbol(layer: int) -> str:
        kept = sorted(head for at, head in HEADS[:count] if at == layer)
        heads = f"[{','.join(map(str, kept))}]" if kept else ""
        return f"M2{heads}" if layer in CONVERTED else "*"

    return "-".join(symbol(layer) for layer in range(LAYERS))


def get_config(which: str = "sweep") -> ConfigDict:
    if which == "sweep":
        return ConfigDict(
            {
                "configs": tuple(f"configs/studies/kept_heads.py:{point}" for point in POINTS),
                "grid": {"seed": (1, 101, 201)},
                "evaluate": {"config": "configs/studies/mixers.py:evaluate", "models": {"source": "launch/tiny_qwen3"}},
            }
        )
    if which not in POINTS:
        raise ValueError(f"kept_heads knows sweep, {', '.join(POINTS)} (heads kept beside M2), got {which!r}")
    form, _, count = which.rpartition("-")
    config = load_config(["--config=configs/prime_tiny.py:M2"])
    config.pattern = pattern_with(int(count))
    config.mixers.head_hybrid_config = {"merge": "standardized" if form == "published" else "sum"}
    if form == "small":
        config.mixers.mamba2_config = {"state_size": 4}
    return config
