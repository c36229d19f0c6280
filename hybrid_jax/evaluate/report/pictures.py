"""The pictures of an evaluation: recovery over the stages of runs, curves over a coordinate, heat maps over two."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.measured import Measured
from hybrid_jax.evaluate.measurement import Measurement
from hybrid_jax.evaluate.report.tables import columns, find

LINES = ("--", ":", "-.", (0, (1, 4)))  # of the models in the picture of a recovery; of curves whose colors repeat
COLORS = 10  # of lines, before they repeat
MANY = 6  # so many names of a legend leave room for the curves
SHORT = 4  # characters of a label that fit below a cell of a heat map
NUMBERED = 16  # so many cells of a heat map side by side have room for their numbers, and their ticks for a label each


@contextlib.contextmanager
def _without_formulas() -> Iterator[None]:
    """Pictures in this block show texts as they are: a `$` in a model's name begins no formula."""
    with plt.rc_context({"text.parse_math": False}):
        yield


def outcomes(rows: Sequence[Measured]) -> list[Measured]:
    """Returns the models, and of each run only the last stage."""
    last = {row.target.run: row for row in rows if row.target.run}
    return [row for row in rows if not row.target.run or last[row.target.run] is row]


def _scaled(m: Measurement) -> tuple[float, float, float]:
    """Returns (value, low, high); shares in percent."""
    factor = 100 if m.unit == "share" else 1
    return factor * m.value, factor * m.low, factor * m.high


def _label(measure: str, unit: str) -> str:
    return f"{measure.replace('_', ' ')}{f' ({unit})'.replace('share', '%') if unit else ''}"


def _legend(axis: Axes) -> None:
    """Draws the legend of all lines, beside the picture if it would cover it; matplotlib's own choice leaves out names that begin
    with `_`."""
    beside: dict[str, Any] = dict(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    names = [str(line.get_label()) for line in axis.lines]
    axis.legend(axis.lines, names, **(beside if len(names) > MANY else {}))


@_without_formulas()
def draw_recovery(evaluation: Evaluation, rows: Sequence[Measured], path: pathlib.Path) -> bool:
    """Draws the headlines that were sampled over the stages: one line per run, a level per model without a run.

    Returns:
      Whether there was something to draw.
    """
    shown = [c for c in columns(evaluation, rows) if any((m := find(r, *c[1:])) is not None and m.sums for r in rows)]
    runs = list(dict.fromkeys(r.target.run for r in rows if r.target.run))
    if not shown or not runs:
        return False
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], shown, strict=True):
        for n, row in enumerate(r for r in rows if not r.target.run):
            if (m := find(row, column.instrument, column.key)) is not None:
                axis.axhline(_scaled(m)[0], color="black", linestyle=LINES[n % len(LINES)], label=row.target.name)
        unit = ""
        for run in runs:
            stages = [(r, find(r, column.instrument, column.key)) for r in rows if r.target.run == run]
            there = [(r.target.name.removeprefix(run).strip(), m) for r, m in stages if m is not None]
            axis.plot([name for name, _ in there], [_scaled(m)[0] for _, m in there], marker="o", label=run)
            unit = there[0][1].unit if there else unit
        axis.set(title=column.instrument, ylabel=_label(str(column.key[0]), unit))
        axis.grid(alpha=0.3)
        _legend(axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


@_without_formulas()
def draw_series(rows: Sequence[Measured], instrument: str, keys: Sequence[tuple], path: pathlib.Path) -> bool:
    """Draws a measure at one coordinate as a curve per model with its interval, at two as a heat map per model.

    Returns:
      Whether there was something to draw: more than one place, and not more than two coordinates.
    """
    shown = outcomes(rows)
    coordinates = len(keys[0]) - 1
    if len(keys) < 2 or coordinates > 2:
        return False
    found = {(n, key): m for n, row in enumerate(shown) for key in keys if (m := find(row, instrument, key)) is not None}
    if not found:
        return False
    first = next(iter(found.values()))
    if coordinates == 1:
        _draw_curves(shown, instrument, keys, found, first, path)
    else:
        _draw_heat_maps(shown, instrument, keys, found, first, path)
    return True


def _draw_curves(shown, instrument, keys, found, first, path):
    many = len(shown) > MANY
    size = (10, max(4, 0.24 * len(shown))) if many else (7, 4)  # high enough for the legend beside it
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    (name,) = first.at
    numeric = all(isinstance(key[1][1], int | float) for key in keys)
    for n, row in enumerate(shown):
        there = [(key[1][1], _scaled(found[n, key])) for key in keys if (n, key) in found]
        if not there:
            continue
        x = [at for at, _ in there] if numeric else [str(at) for at, _ in there]
        value, low, high = zip(*(v for _, v in there), strict=True)
        (line,) = axis.plot(x, value, marker="o", linestyle=("-", *LINES)[n // COLORS % (1 + len(LINES))], label=row.target.name)
        if not many:  # so many bands would cover the curves; the table has the intervals
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.08, linewidth=0)
    if numeric and min(key[1][1] for key in keys) > 0:
        axis.set_xscale("log", base=2)
        axis.set_xticks([key[1][1] for key in keys], [f"{key[1][1]:,}" for key in keys])
        axis.minorticks_off()
    axis.set(title=instrument, xlabel=name.replace("_", " "), ylabel=_label(first.measure, first.unit))
    axis.grid(alpha=0.3)
    _legend(axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _number_format(values: Sequence[float]) -> Callable[[float], str]:
    """Returns how numbers beside each other are written: with the decimals that the largest one has with three digits, so that
    small ones are not longer than it is; from 10,000 on in powers of ten."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest >= 1e4:
        return "{:.2g}".format
    decimals = 2 - math.floor(math.log10(largest)) if largest else 0
    return f"{{:.{max(0, decimals)}f}}".format if decimals < 6 else "{:.1g}".format


def _draw_heat_maps(shown, instrument, keys, found, first, path):
    across, down = list(first.at)
    xs, ys = (list(dict.fromkeys(dict(key[1:])[name] for key in keys)) for name in (across, down))
    levels = [_scaled(m)[0] for m in found.values()]
    low, high = (0, 100) if first.unit == "share" else (min(levels), max(levels))
    size = (max(4.2, 1.2 + 0.22 * len(xs)) * len(shown), max(3.6, 1.2 + 0.18 * len(ys)))
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False, sharey=True)
    scale, number = ScalarMappable(Normalize(low, high), "viridis"), _number_format(levels)
    for n, (axis, row) in enumerate(zip(axes[0], shown, strict=True)):
        by_place = {tuple(dict(key[1:])[c] for c in (across, down)): found.get((n, key)) for key in keys}
        grid = [[_scaled(m)[0] if (m := by_place.get((x, y))) is not None else float("nan") for x in xs] for y in ys]
        axis.imshow(grid, norm=scale.norm, cmap=scale.cmap, aspect="auto")
        for j, line in enumerate(grid if max(len(xs), len(ys)) <= NUMBERED else ()):
            for i, value in enumerate(line):
                axis.text(
                    i,
                    j,
                    number(value),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value < (low + high) / 2 else "black",
                )
        axis.set(title=row.target.name, xlabel=across.replace("_", " "))
        for ticks, values in ((axis.set_xticks, xs), (axis.set_yticks, ys)):
            labeled = range(0, len(values), -(-len(values) // NUMBERED))
            ticks(labeled, [str(values[n]) for n in labeled])
        if max(len(str(x)) for x in xs) > SHORT:  # names beside each other would be written over each other
            axis.tick_params("x", rotation=60)
            plt.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
    axes[0][0].set_ylabel(down.replace("_", " "))
    figure.colorbar(scale, ax=axes[0].tolist(), label=f"{instrument}: {_label(first.measure, first.unit)}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
