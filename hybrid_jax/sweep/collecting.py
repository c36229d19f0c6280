"""The table and the picture of a sweep."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Column, Table

from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.measured import Measured, over_repeats, read_measured
from hybrid_jax.evaluate.report import document, write_report
from hybrid_jax.evaluate.report.page import RESULTS
from hybrid_jax.evaluate.report.tables import columns, find, show
from hybrid_jax.files import write_text
from hybrid_jax.parallel.distributed import say
from hybrid_jax.sweep.points import MODELS, Point, names_of
from hybrid_jax.sweep.running import EVALUATION

LOSS = "last loss of the last phase"
SEED = "seed"


def collect(
    out: pathlib.Path, points: Sequence[Point], results: Mapping[str, dict[str, Any]], evaluation: Evaluation | None = None
) -> list[dict[str, Any]]:
    """Writes the table, the picture and the report of what is there, prints the table, and returns its rows, one per point.

    Points that differ only in their seed are repetitions: the report shows their means, with intervals over the seeds. Before
    them it has the models that the sweep is compared with.

    Args:
      results: outcomes by the names of points; those that are not there are read from `out`.
      evaluation: how the points are evaluated; None: they are not.
    """
    rows, measured = [], {}
    beside = out / MODELS / RESULTS
    models = read_measured(beside) if evaluation is not None and beside.exists() else []
    for point in points:
        kept = out / "results" / f"{point.name}.json"
        waiting = {"name": point.name, "status": "not run", "overrides": dict(point.overrides), "config": point.config}
        rows.append(results.get(point.name) or (json.loads(kept.read_text()) if kept.exists() else waiting))
        found = out / "runs" / point.name / EVALUATION / RESULTS
        if evaluation is not None and rows[-1]["status"] == "done" and found.exists():
            measured[point.name] = read_measured(found)[0].named(point.name)
    shown = columns(evaluation, [*models, *measured.values()]) if evaluation is not None else []
    for row in rows:
        numbers = [find(measured[row["name"]], c.instrument, c.key) if row["name"] in measured else None for c in shown]
        row["measures"] = {c.title: m.value for c, m in zip(shown, numbers, strict=True) if m is not None}
        row["cells"] = [show(m) for m in numbers]
    phases = list(dict.fromkeys(name for row in rows for name in row.get("losses", {})))
    header = ("point", "status", "tokens", "seconds", *(f"{p} loss" for p in phases), *(c.title for c in shown))
    cells = []
    for row in rows:
        losses = (_number(row.get("losses", {}).get(p), ".4f") for p in phases)
        cost = _number(row.get("tokens"), ",d"), _number(row.get("seconds"), ",.0f")
        cells.append((row["name"], row["status"], *cost, *losses, *row.pop("cells")))
    table = Table(*(Column(name, overflow="fold") for name in header), title=str(out))
    for line in cells:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 160).print(table)
    write_text(out / "table.md", document.Table(header, cells).markdown() + "\n")
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    draw_sweep(rows, out / "sweep.png")
    if evaluation is not None and measured:
        (out / "report").mkdir(exist_ok=True)
        compared = [*models, *_grouped(points, measured)]
        say(f"report: {write_report(evaluation, compared, out / 'report', title=f'Sweep: {out.name}')}")
    return rows


def _grouped(points: Sequence[Point], measured: Mapping[str, Measured]) -> list[Measured]:
    """Returns the measured points; those that differ only in their seed as one, with intervals over the seeds."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.name in measured:
            groups.setdefault(repr(point.without(SEED)), []).append(point)  # values may be lists
    without = [same[0].without(SEED) for same in groups.values()]
    names, found = names_of([(config, dict(overrides)) for config, overrides in without]), []
    for name, same in zip(names, groups.values(), strict=True):
        repeats = [measured[p.name] for p in same]
        found.append(over_repeats(f"{name} ({len(same)} seeds)", repeats) if len(same) > 1 else repeats[0])
    return found


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw_sweep(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws a bar per point: the first measure of the evaluation where all have it, else the last phase's loss."""
    done = [row for row in rows if row["status"] == "done"]
    measure = next((name for row in done for name in row.get("measures", {})), None)
    if measure is not None and all(measure in row.get("measures", {}) for row in done):
        label, values = measure, [row["measures"][measure] for row in done]
    else:
        label, values = LOSS, [[math.nan, *row["losses"].values()][-1] for row in done]
    names = [row["name"].replace(",", "\n") for row in done]
    lines = sum(1 + name.count("\n") for name in names)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.3 * max(lines, 1)), layout="constrained")
    axis.barh(range(len(done)), [value if math.isfinite(value) else 0.0 for value in values])
    axis.set_yticks(range(len(done)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(title=f"{path.absolute().parent.name}: {len(done)} of {len(rows)} points", xlabel=label)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        axis.set_xlim(left=0.95 * min(finite))
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)
