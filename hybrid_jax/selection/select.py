"""Which layers to convert: those whose conversion costs least by a scorer (see `selection.scorers`)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.checks import check_choice, check_integer, check_known, check_number
from hybrid_jax.config import ATTENTION, ModelConfig, parse_pattern
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measurement import Z
from hybrid_jax.files import write_text
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import is_first, say
from hybrid_jax.selection import BUDGETS
from hybrid_jax.selection.budgets import converted, pattern_from_scores, pattern_of_bytes, pattern_of_heads
from hybrid_jax.selection.scorers import DEFAULT_SCORER, SCORERS, find_scorer
from hybrid_jax.selection.scorers.contract import Scorer, Scores, scores_heads

# fields of `config.select` that are not options of the scorer
GENERAL = ("mixer", "fraction", "scorer", "budget", "state_bytes", "tokens")


@dataclasses.dataclass(frozen=True)
class Selection:
    """How to choose a pattern.

    Args:
      mixer: symbol of the mixer that replaces attention.
      fraction: fraction of the layers, or of the heads, to convert.
      scorer: what measures the cost of converting a layer or a head; a key of `scorers.SCORERS`.
      options: options of the scorer by name; those that are absent have its defaults.
      budget: `layers`: a fraction of the layers is converted. `heads`: a fraction of all heads; the scorer must be one of heads.
        `bytes`: as few layers as fit in `state_bytes`; `fraction` has no effect.
      state_bytes: for `bytes`: what one sequence of `tokens` tokens may hold in keys, values (bfloat16) and states.
      tokens: for `bytes`.

    Raises:
      ValueError: an unknown scorer or option, or a bad value.
    """

    mixer: str = "GKA"
    fraction: float = 0.5
    scorer: str = DEFAULT_SCORER
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: str = "layers"
    state_bytes: int = 0
    tokens: int = 0

    def __post_init__(self):
        check_number("select.fraction", self.fraction, above=0, maximum=1)
        check_choice("select.budget", self.budget, BUDGETS)
        for name in ("state_bytes", "tokens"):
            value = check_integer(f"select.{name}", getattr(self, name), minimum=0)
            if bool(value) != (self.budget == "bytes"):
                raise ValueError(f"select.{name} must be set with select.budget 'bytes', and not with others; got {value}")
        specs = parse_pattern(self.mixer)
        if len(specs) != 1 or specs[0].kind == ATTENTION or specs[0].attention_heads:
            raise ValueError(f"select.mixer must be the symbol of one mixer, got {self.mixer!r}")
        if self.budget == "heads" and (specs[0].fused or not KINDS[specs[0].kind].recurrent):
            raise ValueError(f"select.mixer must be recurrent where heads of attention stay beside it, got {self.mixer!r}")
        scorer = self.make_scorer()
        if scores_heads(scorer) != (self.budget == "heads"):
            of, needs = ("heads", "scores of layers") if scores_heads(scorer) else ("layers", "scores of heads")
            raise ValueError(
                f"select.scorer {self.scorer!r} scores {of}, select.budget {self.budget!r} needs {needs}; choose another of the two"
            )

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Selection:
        """Returns the selection that `config.select` describes, where the scorer's options stand beside the other fields."""
        general = {name: values[name] for name in GENERAL if name in values}
        return cls(**general, options={name: value for name, value in values.items() if name not in GENERAL})

    def make_scorer(self) -> Scorer:
        """Returns the scorer with its options."""
        return make_scorer(self.scorer, self.options)

    def check(self, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Checks, before a model is loaded, that a model of this config can be scored on a mesh and that the budget fits it.

        Raises:
          ValueError, FileNotFoundError: it cannot be scored, a layer is no attention, or the budget would convert nothing or
            cannot be met.
        """
        check_scorer(self.make_scorer(), config, mesh)
        self.example(config)

    def pattern(self, scores: Scores, config: ModelConfig) -> str:
        """Returns the pattern that follows from scores of a model of this config.

        Raises:
          ValueError: a score is not finite, or the budget would convert nothing or cannot be met.
        """
        if self.budget == "heads":
            return pattern_of_heads(scores.per_head(), self.mixer, self.fraction)
        if self.budget == "bytes":
            return pattern_of_bytes(scores.per_layer(), self.mixer, config, self.state_bytes, self.tokens)
        return pattern_from_scores(scores.per_layer(), self.mixer, self.fraction)

    def example(self, config: ModelConfig) -> str:
        """Returns the pattern of equal scores: of the kind that the selection will give, known before anything is measured."""
        shape = (config.num_layers, config.num_heads)
        return self.pattern(Scores(np.zeros(shape if self.budget == "heads" else shape[:1]), ""), config)

    def described(self) -> dict[str, Any]:
        """Returns every field and every option of the scorer by name, as `config.select` has them."""
        options = dataclasses.asdict(self.make_scorer())
        return {name: getattr(self, name) for name in GENERAL} | options


def make_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Returns a scorer with its options.

    Args:
      name: a key of `scorers.SCORERS`.
      options: by name; those that are absent have their defaults.

    Raises:
      ValueError: an unknown scorer or option, or a bad value.
    """
    kind = find_scorer(name)
    check_known(f"select, with the scorer {name!r},", options, scorer_options(name))
    return kind(**options)


def check_scorer(scorer: Scorer, config: ModelConfig, mesh: Mesh | None) -> None:
    """Checks, before a model is loaded, that a scorer can score a model of this config on a mesh.

    Raises:
      ValueError, FileNotFoundError: it cannot, or a layer is no attention.
    """
    for i, layer in enumerate(config.layers):
        if layer.kind != ATTENTION or layer.fused:
            raise ValueError(f"select.scorer: layer {i} is {layer.symbol!r}, only a model whose layers are attention is scored")
    scorer.check(config, mesh)


def scorer_options(scorer: str) -> dict[str, Any]:
    """Returns a scorer's options with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(find_scorer(scorer))}


def select_fields(select: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every field that `config.select` may have, with its default; the options are those of the scorer it names."""
    scorer = select.get("scorer", DEFAULT_SCORER)
    general = {field.name: field.default for field in dataclasses.fields(Selection) if field.name in GENERAL}
    return general | scorer_options(scorer if scorer in SCORERS else DEFAULT_SCORER)


def score_layers(model: Decoder, corpus: Corpus, selection: Selection, mesh: Mesh | None = None) -> Scores:
    """Scores a model's layers, or its heads, by a selection's scorer; see `score_by`."""
    return score_by(selection.scorer, selection.make_scorer(), model, corpus, mesh)


def score_by(name: str, scorer: Scorer, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
    """Scores a model's layers, or its heads, and reports each cost.

    Args:
      name: of the scorer, for messages.
      model: the source; it is left unchanged.
      corpus: the text to score on.
      mesh: of the model; None: one device.

    Raises:
      ValueError: the scorer did not score each layer, or each head, of the model.
    """
    scores, config = scorer.score(model, corpus, mesh), model.config
    if len(scores.costs) != config.num_layers:
        raise ValueError(f"the scorer {name!r} scored {len(scores.costs)} layers, the model has {config.num_layers}")
    if scores.of_heads and scores.costs.shape[1] != config.num_heads:
        raise ValueError(f"the scorer {name!r} scored {scores.costs.shape[1]} heads, the model has {config.num_heads}")
    errors = [None] * len(scores.costs) if scores.errors is None else scores.errors
    for layer, (cost, error) in enumerate(zip(scores.costs, errors, strict=True)):
        if scores.of_heads:
            say(f"select: converting the heads of layer {layer} costs {' '.join(f'{c:+.4f}' for c in cost)} {scores.unit}")
        else:
            within = "" if error is None else f" ± {Z * error:.4f}"
            say(f"select: converting layer {layer} costs {cost:+.4f}{within} {scores.unit}")
    return scores


def uncertain_choice(scores: Scores, pattern: str) -> str:
    """Returns in words which layers, or how many heads, might change places if more data were scored; empty if none, or if
    nothing was sampled.

    These are the kept ones whose cost is above that of a converted one by less than 1.96 standard errors of the difference,
    taken as if the two were measured on different data, which is cautious.

    Args:
      pattern: what was chosen by the scores.
    """
    if scores.errors is None:
        return ""
    of = converted(pattern, scores.costs.shape).ravel()
    costs, errors = scores.costs.ravel(), np.asarray(scores.errors).ravel()
    gap = costs[None, ~of] - costs[of, None]
    close = ~(gap > Z * np.hypot(errors[None, ~of], errors[of, None]))
    if not close.any():
        return ""
    ours, theirs = np.flatnonzero(of)[close.any(axis=1)].tolist(), np.flatnonzero(~of)[close.any(axis=0)].tolist()
    if scores.of_heads:
        which = f"which of {len(ours)} converted and {len(theirs)} kept heads to convert"
    else:
        which = f"whether to convert {_layers(ours)} or {_layers(theirs)}"
    return f"the rows do not tell {which}: their costs differ by less than the noise; more rows would"


def _layers(numbers: Sequence[int]) -> str:
    return f"{'layer' if len(numbers) == 1 else 'layers'} {', '.join(map(str, numbers))}"


def select_pattern(model: Decoder, corpus: Corpus, selection: Selection, mesh: Mesh | None = None) -> tuple[str, Scores]:
    """Returns the pattern that a selection chooses for a model, and the scores; says each cost, and what the rows do not tell.

    Args:
      model, corpus, mesh: see `score_layers`.
    """
    scores = score_layers(model, corpus, selection, mesh)
    pattern = selection.pattern(scores, model.config)
    if note := uncertain_choice(scores, pattern):
        say(f"select: {note}")
    return pattern, scores


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
    pattern, scores = select_pattern(model, corpus, selection, mesh)
    if is_first():
        record = {"pattern": pattern, "scores": scores.costs.tolist(), **selection.described()}
        write_text(workdir / "selection.json", json.dumps(record, indent=2) + "\n")
    say(f"select: {pattern}")
    return pattern
