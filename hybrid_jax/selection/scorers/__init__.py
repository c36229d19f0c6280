"""Scorers: ways to measure what converting a layer costs. This is their table; `contract` says what a scorer is.

To add one, write `selection/scorers/NAME.py` with a frozen dataclass that follows `contract.Scorer`, and one line here.
`config.select.scorer` and `hybrid-jax select --scorer` choose by these names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hybrid_jax.checks import check_choice

if TYPE_CHECKING:
    from hybrid_jax.selection.scorers.contract import Scorer

# Name -> module of this folder and the class in it. Modules are imported when they are used: the command line reads the names.
SCORERS: dict[str, str] = {
    "swa_retrieval": "swa_retrieval:SwaRetrieval",
    "gradient_error": "gradient_error:GradientError",
    "linear_fit": "linear_fit:LinearFit",
    "attention_distance": "attention_distance:AttentionDistance",
    "head_ablation": "head_ablation:HeadAblation",
    "uniform": "uniform:Uniform",
    "score_file": "score_file:ScoreFile",
}
DEFAULT_SCORER = "swa_retrieval"


def find_scorer(name: str) -> type[Scorer]:
    """Returns the class of a scorer.

    Args:
      name: a key of `SCORERS`.

    Raises:
      ValueError: no scorer has that name.
    """
    module, _, cls = SCORERS[check_choice("select.scorer", name, SCORERS)].partition(":")
    path = module if "." in module else f"{__name__}.{module}"  # a full path names a module of another package
    return getattr(importlib.import_module(path), cls)
