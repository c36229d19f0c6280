"""Study: which method converts the small source best, at an equal budget of tokens?

    hybrid-jax sweep --config configs/studies/methods.py --out runs/studies/methods

Four of the eight layers of the small source (launch/tiny_qwen3), those of mixers.py, become Gated KalmaNet, Gated DeltaNet, Mamba-2
or the Discrete Mamba-2 of MOHAWK by each method, every one with 81,920 tokens:

  priming     mixers from attention's weights; alignment of layers, then next tokens (arXiv 2605.08301);
  mohawk-123  new mixers; matrices, then layers, then the teacher's predictions (arXiv 2408.10189);
  mohawk-23   the same without the first stage;
  mohawk-3    the last stage alone;
  end-to-end  mixers from attention's weights; the teacher's predictions, everything trains (arXiv 2408.15237);
  stepwise    mixers from attention's weights; two layers first, then two more, only mixers train (arXiv 2408.15237);
  heads       new Mamba-2 in layers 2 to 7 beside two heads of attention; layers, then predictions (arXiv 2602.11374).

`same-data` is the source trained on the same data without a conversion. Three seeds. `configs/studies/methods.py:priming-GDN` is
one experiment. The outcome is in methods.md.
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config
from hybrid_jax.mixers import KINDS

MIXERS = {row.symbol: row for row in KINDS.values()}
QUARTER, HALF = "*-*-X-X-*-*-*-*", "*-*-X-X-*-*-X-X"  # as in mixers.py
HEADS = "*-*-X-X-X[1]-X[0]-X-X"  # the two heads with the most evidence of pairs, as in kept_heads.py
METHODS = ("priming", "mohawk-123", "mohawk-23", "mohawk-3", "end-to-end", "stepwise")
POINTS = (*(f"{method}-{mixer}" for method in METHODS for mixer in ("GKA", "GDN", "M2")),
          *(f"{method}-DM2" for method in METHODS if method.startswith("mohawk")), "heads-M2")  # fmt: skip
SAME = "same-data"
SHORT, LONG = {"batch_size": 4, "seq_len": 256}, {"batch_size": 2, "seq_len": 1024}  # rows of a step: 1,024 and 2,048 tokens
MIX = {"text": 0.5, "needles": 0.3, "pairs": 0.2}  # of long rows; that of short ones is the experiment's


def get_config(which: str = "sweep") -> ConfigDict:
    if which == "sweep":
        return ConfigDict(
            {
                "configs": tuple(f"configs/studies/methods.py:{point}" for point in (SAME, *POINTS)),
                "grid": {"seed": (1, 101, 201)},
                "evaluate": {"config": "configs/studies/methods.py:evaluate", "models": {"source": "launch/tiny_qwen3"}},
            }
        )
    if which == "evaluate":  # as in mixers.py, without the grid of needles, which takes three quarters of the time
        config = load_config(["--config=configs/studies/mixers.py:evaluate"])
        del config.instruments.needle
        return config
    if which == SAME:
        config = load_config(["--config=configs/prime_tiny.py:SWA"])
        config.pattern, config.phases.train.steps = HALF.replace("X", "*"), 40
        return config
    if which not in POINTS:
        raise ValueError(f"methods knows sweep, evaluate, {SAME}, {', '.join(POINTS)}, got {which!r}")
    method, _, mixer = which.rpartition("-")
    config = load_config([f"--config=configs/prime_tiny.py:{mixer}"])
    key = rf"\.{MIXERS[mixer].parameter_key}\."
    config.pattern = {"heads": HEADS, "stepwise": QUARTER}.get(method, HALF).replace("X", mixer)
    config.copy_attention = method in ("priming", "end-to-end", "stepwise")
    if method == "priming":
        return config
    matrices = phase(config, "align_matrices", SHORT, (key,), learning_rate=5e-3)
    layers = phase(config, "align_mixer", SHORT, (key,), learning_rate=5e-3, inputs="teacher", pre_lm_head=False)
    distill = phase(config, "distill", LONG, ("all",), learning_rate=3e-4)
    alone = phase(config, "distill", LONG, (key,), learning_rate=1e-3, divergence_weight=0.1, next_token_weight=1.0)
    phases = {
        "mohawk-123": {"matrices": matrices | {"steps": 12}, "layers": layers | {"steps": 48}, "distill": distill | {"steps": 10}},
        "mohawk-23": {"layers": layers | {"steps": 60}, "distill": distill | {"steps": 10}},
        "mohawk-3": {"distill": distill | {"steps": 40, "learning_rate": 1e-3}},
        "end-to-end": {"distill": distill | {"steps": 40}},
        "stepwise": {
            "quarter": alone | {"steps": 20},
            "half": alone | {"steps": 20, "pattern": HALF.replace("X", mixer)},
        },
        "heads": {"layers": layers | {"steps": 60}, "distill": distill | {"steps": 10}},
    }
    config.phases, config.schedule = ConfigDict(phases[method]), tuple(phases[method])
    return config


def phase(
    config: ConfigDict, objective: str, rows: dict[str, int], trainable: tuple[str, ...], *, learning_rate: float, **options: Any
):
    """Returns a phase without its steps; the schedule of learning rates is that of prime_tiny.py."""
    base = {"form": "fused", "objective": objective, "options": options, "trainable": trainable, "learning_rate": learning_rate}
    shape = {"optimizer": "adamw", "schedule": "cosine", "final_fraction": 0.05, "warmup_steps": 3}
    return {**base, **shape, **rows, **({"mix": MIX, "answer_weight": 4.0} if rows is LONG else {})}
