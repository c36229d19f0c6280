"""Several scorers on one model, side by side: what they cost, whether they agree, and which layers each would convert."""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import Mesh
from matplotlib.patches import Rectangle
from scipy import stats

from hybrid_jax.config import parse_pattern
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.report.document import Heading, Picture, Table, Text, as_markdown
from hybrid_jax.evaluate.report.tables import NOTHING
from hybrid_jax.files import write_text
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import say
from hybrid_jax.selection.budgets import converted, pattern_from_scores, pattern_of_heads
from hybrid_jax.selection.scorers import DEFAULT_SCORER
from hybrid_jax.selection.scorers.contract import Scorer, Scores, forward_passes
from hybrid_jax.selection.select import score_by

NOTES = (
    "A forward pass is one of the model over the scorer's rows; how many a scorer takes is counted, not measured. Seconds are "
    "measured, with the compilation of its programs.",
    f"Agreement is Kendall's tau-b of the layers' costs with those of {DEFAULT_SCORER}, from -1 to 1. A scorer of heads gives a "
    "layer the sum of its heads' costs.",
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One scorer's result on a model.

    Args:
      scorer: its name.
      scores: what it found.
      seconds: that scoring took.
      passes: forward passes that it takes, see `contract.forward_passes`.
      pattern: the fraction of the layers that it would convert.
      heads: the same fraction of the heads; empty of a scorer of layers, and where the mixer keeps no heads beside it.
    """

    scorer: str
    scores: Scores
    seconds: float
    passes: float | None
    pattern: str
    heads: str = ""


def compare_scorers(
    model: Decoder, corpus: Corpus, scorers: Mapping[str, Scorer], mixer: str, fraction: float, mesh: Mesh | None = None
) -> list[Compared]:
    """Scores a model by each of several scorers.

    Args:
      model: the source; it is left unchanged.
      corpus: the text to score on.
      scorers: by name, in the order of the result.
      mixer: symbol of the mixer in the patterns.
      fraction: of the layers, or of the heads, that each would convert.
      mesh: of the model; None: one device.
    """
    found, (spec,) = [], parse_pattern(mixer)
    for name, scorer in scorers.items():
        say(f"select: {name}")
        begin = time.perf_counter()
        scores = score_by(name, scorer, model, corpus, mesh)
        seconds = time.perf_counter() - begin
        keeps_heads = scores.of_heads and KINDS[spec.kind].recurrent
        heads = pattern_of_heads(scores.costs, mixer, fraction) if keeps_heads else ""
        pattern = pattern_from_scores(scores.summed().tolist(), mixer, fraction)
        found.append(Compared(name, scores, seconds, forward_passes(scorer, model.config), pattern, heads))
    return found


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Returns Kendall's tau-b of two costs of the same layers; not a number where all layers cost the same."""
    found: Any = stats.kendalltau(one, other)  # its type is not scipy's own
    return float(found.statistic)


def comparison_table(compared: Sequence[Compared]) -> Table:
    """Returns the table with a line per scorer; a scorer of heads has a second one for the same fraction of heads.

    Args:
      compared: among them the published scorer's, to which the others are compared.
    """
    published = next(c for c in compared if c.scorer == DEFAULT_SCORER)
    shape = published.scores.costs.shape
    chosen, lines = converted(published.pattern, shape), []
    for c in compared:
        tau = agreement(c.scores.summed(), published.scores.summed())
        common = f"{(converted(c.pattern, shape) & chosen).sum()} of {chosen.sum()}"
        cost = NOTHING if c.passes is None else f"{c.passes:,.1f}", f"{c.seconds:.1f}"
        lines.append((c.scorer, c.scores.unit, *cost, NOTHING if np.isnan(tau) else f"{tau:+.2f}", common, c.pattern))
        if c.heads:
            lines.append((f"{c.scorer}, of heads", *[NOTHING] * 5, c.heads))
    header = ("scorer", "unit", "forward passes", "seconds", "agreement", "layers in common", "pattern")
    return Table(header, lines, code=(len(header) - 1,))


def write_comparison(compared: Sequence[Compared], directory: pathlib.Path) -> pathlib.Path:
    """Writes `comparison.md`, the same table as `comparison.csv`, every cost in `scores.csv`, and the picture `scores.png`.

    Args:
      directory: there, and writable.

    Returns:
      The Markdown file.
    """
    table, picture = comparison_table(compared), directory / "scores.png"
    draw_ranks(compared, picture)
    blocks = [Heading("Scorers of layers", 1), table, *map(Text, NOTES), Picture(picture, "ranks of the layers by each scorer")]
    write_text(directory / "comparison.csv", _csv([table.header, *table.rows]))
    write_text(directory / "scores.csv", _csv([("scorer", "layer", "head", "cost", "error", "unit"), *_costs(compared)]))
    write_text(directory / "comparison.md", as_markdown(blocks))
    return directory / "comparison.md"


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _costs(compared: Sequence[Compared]) -> list[tuple]:
    """Returns scorer, layer, head (empty: the layer's), cost, standard error (empty: none) and unit of every cost."""
    lines = []
    for c in compared:
        for at, cost in np.ndenumerate(c.scores.costs):
            error = "" if c.scores.errors is None else float(c.scores.errors[at])
            layer, head = (*at, "")[:2]
            lines.append((c.scorer, layer, head, float(cost), error, c.scores.unit))
    return lines


def draw_ranks(compared: Sequence[Compared], path: pathlib.Path) -> None:
    """Draws a heat map of layers by scorers: the color is the layer's rank by its cost, the number the cost, a frame says that the
    layer is converted."""
    costs = np.stack([c.scores.summed() for c in compared])
    ranks = stats.rankdata(costs, axis=1)
    figure, axis = plt.subplots(figsize=(2.5 + 0.6 * costs.shape[1], 1.6 + 0.45 * len(costs)), layout="constrained")
    image = axis.imshow(ranks, cmap="viridis", aspect="auto", vmin=1, vmax=costs.shape[1])
    for (i, layer), cost in np.ndenumerate(costs):
        color = "white" if ranks[i, layer] < (1 + costs.shape[1]) / 2 else "black"
        axis.text(layer, i, f"{cost:.2g}", ha="center", va="center", fontsize=7, color=color)
        if converted(compared[i].pattern, costs.shape[1:])[layer]:
            axis.add_patch(Rectangle((layer - 0.45, i - 0.45), 0.9, 0.9, fill=False, edgecolor="red", linewidth=1.5))
    axis.set_xticks(range(costs.shape[1]))
    axis.set_yticks(range(len(costs)), [c.scorer for c in compared])
    axis.set_xlabel("layer")
    figure.colorbar(image, label="rank (1: cheapest)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
