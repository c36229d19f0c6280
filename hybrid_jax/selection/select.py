"""Which layers to convert: those whose conversion costs least by a scorer (see `selection.scorers`)."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.checks import check_known, check_number
from hybrid_jax.config import ATTENTION, ModelConfig, parse_pattern
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measurement import Z
from hybrid_jax.files import write_text
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import is_first, say
from hybrid_jax.selection.scorers import DEFAULT_SCORER, SCORERS, find_scorer
from hybrid_jax.selection.scorers.contract import Scorer, Scores

GENERAL = ("mixer", "fraction", "scorer")  # fields of `config.select` that are not options of the scorer


@dataclasses.dataclass(frozen=True)
class Selection:
    """How to choose a pattern.

    Args:
      mixer: symbol of the mixer that replaces attention.
      fraction: fraction of the layers to convert.
      scorer: what measures the cost of converting a layer; a key of `scorers.SCORERS`.
      options: options of the scorer by name; those that are absent have its defaults.

    Raises:
      ValueError: an unknown scorer or option, or a bad value.
    """

    mixer: str = "GKA"
    fraction: float = 0.5
    scorer: str = DEFAULT_SCORER
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_number("select.fraction", self.fraction, above=0, maximum=1)
        if parse_pattern(self.mixer)[0].kind == ATTENTION:
            raise ValueError(f"select.mixer must be a mixer, got {self.mixer!r}")
        self.make_scorer()

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Selection:
        """Returns the selection that `config.select` describes, where the scorer's options stand beside the other fields."""
        general = {name: values[name] for name in GENERAL if name in values}
        return cls(**general, options={name: value for name, value in values.items() if name not in GENERAL})

    def make_scorer(self) -> Scorer:
        """Returns the scorer with its options."""
        kind = find_scorer(self.scorer)
        check_known(f"select, with the scorer {self.scorer!r},", self.options, scorer_options(self.scorer))
        return kind(**self.options)

    def check(self, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Checks, before a model is loaded, that a model of this config can be scored on a mesh and that a layer is converted.

        Raises:
          ValueError, FileNotFoundError: it cannot be scored, or the fraction is less than half a layer.
        """
        self.make_scorer().check(config, mesh)
        pattern_from_scores([0.0] * config.num_layers, self.mixer, self.fraction)

    def described(self) -> dict[str, Any]:
        """Returns every field and every option of the scorer by name, as `config.select` has them."""
        options = dataclasses.asdict(self.make_scorer())
        return {name: getattr(self, name) for name in GENERAL} | options


def scorer_options(scorer: str) -> dict[str, Any]:
    """Returns a scorer's options with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(find_scorer(scorer))}


def select_fields(select: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every field that `config.select` may have, with its default; the options are those of the scorer it names."""
    scorer = select.get("scorer", DEFAULT_SCORER)
    general = {field.name: field.default for field in dataclasses.fields(Selection) if field.name in GENERAL}
    return general | scorer_options(scorer if scorer in SCORERS else DEFAULT_SCORER)


def score_layers(model: Decoder, corpus: Corpus, selection: Selection, mesh: Mesh | None = None) -> Scores:
    """Scores a model's layers and reports each cost.

    Args:
      model: the source; it is left unchanged.
      corpus: the text to score on.
      mesh: of the model; None: one device.

    Raises:
      ValueError: the scorer did not score each layer of the model.
    """
    scores = selection.make_scorer().score(model, corpus, mesh)
    if len(scores.costs) != model.config.num_layers:
        raise ValueError(
            f"the scorer {selection.scorer!r} scored {len(scores.costs)} layers, the model has {model.config.num_layers}"
        )
    if not scores.of_heads:
        errors = [None] * len(scores.costs) if scores.errors is None else scores.errors
        for layer, (cost, error) in enumerate(zip(scores.per_layer(), errors, strict=True)):
            within = "" if error is None else f" ± {Z * error:.4f}"
            say(f"select: converting layer {layer} costs {cost:+.4f}{within} {scores.unit}")
        if note := uncertain_choice(scores, selection.fraction):
            say(f"select: {note}")
    return scores


def uncertain_choice(scores: Scores, fraction: float) -> str:
    """Returns in words which layers might change places if more data were scored; empty if none, or if nothing was sampled.

    These are the kept layers whose cost is above that of a converted one by less than 1.96 standard errors of the difference,
    taken as if the two were measured on different data, which is cautious.
    """
    if scores.errors is None:
        return ""
    order = np.argsort(scores.costs, kind="stable")
    n = round(fraction * len(order))
    close = {
        (int(a), int(b))
        for a in order[:n]
        for b in order[n:]
        if not scores.costs[b] - scores.costs[a] > Z * np.hypot(scores.errors[a], scores.errors[b])
    }
    if not close:
        return ""
    converted, kept = (sorted({pair[i] for pair in close}) for i in range(2))
    return (
        f"the rows do not tell whether to convert {_layers(converted)} or {_layers(kept)}: their costs differ by less than "
        "the noise; more rows would"
    )


def _layers(numbers: Sequence[int]) -> str:
    return f"{'layer' if len(numbers) == 1 else 'layers'} {', '.join(map(str, numbers))}"


def pattern_from_scores(scores: Sequence[float], mixer: str, fraction: float) -> str:
    """Returns the pattern that converts the cheapest `fraction` of the layers; ties go to the earlier layer.

    Args:
      scores: the cost of converting each layer.
      mixer: symbol of the mixer that replaces attention.
      fraction: fraction of the layers to convert, rounded to a number of layers.

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


def choose_pattern(
    model: Decoder, pattern: str, selection: Selection | None, corpus: Corpus, workdir: pathlib.Path, mesh: Mesh | None = None
) -> str:
    """Returns the config's pattern; without one, the pattern that its selection chooses; without both, the model's own.

    Args:
      pattern: may be empty.
      selection: None: nothing is selected.
      workdir: where a selection is recorded, in `selection.json`.
      mesh: of the model; None: one device.
    """
    if pattern:
        return pattern
    if selection is None:
        return model.config.pattern
    scores = score_layers(model, corpus, selection, mesh).per_layer()
    pattern = pattern_from_scores(scores, selection.mixer, selection.fraction)
    if is_first():
        record = {"pattern": pattern, "scores": scores, **selection.described()}
        write_text(workdir / "selection.json", json.dumps(record, indent=2) + "\n")
    say(f"select: {pattern}")
    return pattern
