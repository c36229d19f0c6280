"""Which layers to convert: the paper's ranking with a cheap score.

One attention layer at a time is replaced by sliding-window attention with the same weights, and the loss
it costs is measured (arXiv 2605.08301, section 3.1, scores long-context benchmarks; here: mean
negative log-likelihood on held-out text and on key-value retrieval). The layers that cost least are converted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from hybrid_jax.checks import check_integer, check_number
from hybrid_jax.config import ATTENTION, MixerSpec, SWAConfig, format_pattern, parse_pattern
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measures import PAIRS, retrieval_loss_and_accuracy, text_loss
from hybrid_jax.files import write_text
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import is_first, say
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.priming.initialize import initialize_hybrid


@dataclasses.dataclass(frozen=True)
class Selection:
    """How to choose a pattern.

    Args:
      mixer: symbol of the mixer that replaces attention.
      fraction: of the layers to convert.
      window: of the sliding-window attention that stands in for a mixer while scoring.
      rows, seq_len: held-out rows of each kind to score on.
    """

    mixer: str = "GKA"
    fraction: float = 0.5
    window: int = 16
    rows: int = 16
    seq_len: int = 256

    def __post_init__(self):
        check_number("select.fraction", self.fraction, above=0, maximum=1)
        for name, minimum in (("window", 1), ("rows", 1), ("seq_len", 4 * PAIRS + 2)):
            check_integer(f"select.{name}", getattr(self, name), minimum=minimum)
        if parse_pattern(self.mixer)[0].kind == ATTENTION:
            raise ValueError(f"select.mixer must be a mixer, got {self.mixer!r}")


def score_layers(model: Decoder, corpus: Corpus, selection: Selection) -> list[float]:
    """What replacing each layer by SWA costs: rise of the mean loss (text + retrieval), in nats a token."""
    config = model.config.with_options(SWAConfig(selection.window))
    model = join_model(*split_model(model))  # the caller's model keeps its own window
    model.config = config

    def loss(candidate):
        text = text_loss(candidate, corpus, selection.seq_len, selection.rows)
        return text + retrieval_loss_and_accuracy(candidate, corpus, selection.seq_len, selection.rows)[0]

    whole = loss(model)
    scores = []
    for i in range(config.num_layers):
        symbols = list(config.layers)
        symbols[i] = MixerSpec("swa")
        scores.append(loss(initialize_hybrid(model, format_pattern(symbols))) - whole)
        say(f"select: layer {i} as SWA({selection.window}) costs {scores[-1]:+.4f} nats")
    return scores


def pattern_from_scores(scores: list[float], mixer: str, fraction: float) -> str:
    """Converts the cheapest `fraction` of the layers; ties go to the earlier layer.

    Raises:
      ValueError: a score is not finite, so that there is no order, or the fraction is less than half a layer.
    """
    if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
        raise ValueError(f"the score of layer {bad[0]} is {scores[bad[0]]}, so the layers cannot be ranked")
    if not round(fraction * len(scores)):
        raise ValueError(
            f"select.fraction {fraction} of {len(scores)} layers is none, so nothing would be converted; set it to at least "
            f"{1 / len(scores):.3g}"
        )
    cheapest = sorted(range(len(scores)), key=lambda i: (scores[i], i))[: round(fraction * len(scores))]
    return "-".join(mixer if i in cheapest else "*" for i in range(len(scores)))


def choose_pattern(model: Decoder, pattern: str, select, corpus: Corpus, workdir: pathlib.Path) -> str:
    """The config's pattern; without one, the selection's; without both, the model as it is.

    A selection is kept in `selection.json`.
    """
    if pattern:
        return pattern
    if not select:
        return model.config.pattern
    selection = Selection(**select)
    scores = score_layers(model, corpus, selection)
    pattern = pattern_from_scores(scores, selection.mixer, selection.fraction)
    if is_first():
        record = {"pattern": pattern, "scores": scores, **dataclasses.asdict(selection)}
        write_text(workdir / "selection.json", json.dumps(record, indent=2) + "\n")
    say(f"select: {pattern}")
    return pattern
