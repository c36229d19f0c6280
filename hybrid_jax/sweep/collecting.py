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

from hybrid_jax.files import write_text
from hybrid_jax.sweep.points import Point

LOSS_LABELS = {True: "held-out loss (nats/token)", False: "last loss of the last phase"}


def collect(out: pathlib.Path, points: Sequence[Point], results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the table and the picture of what is there, prints the table, and returns its rows, one per point."""
    rows = []
    for point in points:
        kept = out / "results" / f"{point.name}.json"
        waiting = {"name": point.name, "status": "not run", "overrides": dict(point.overrides), "config": point.config}
        rows.append(results.get(point.name) or (json.loads(kept.read_text()) if kept.exists() else waiting))
    phases = list(dict.fromkeys(name for row in rows for name in row.get("losses", {})))
    header = ("point", "status", *(f"{p} loss" for p in phases), "held-out loss", "retrieval")
    cells = [
        (
            row["name"],
            row["status"],
            *(_number(row.get("losses", {}).get(p), ".4f") for p in phases),
            _number(row.get("held_out_loss"), ".4f"),
            _number(row.get("retrieval"), ".1%"),
        )
        for row in rows
    ]
    table = Table(*(Column(name, overflow="fold") for name in header), title=str(out))
    for line in cells:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 140).print(table)
    lines = [header, tuple("---" for _ in header), *cells]
    write_text(out / "table.md", "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    draw_sweep(rows, out / "sweep.png")
    return rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw_sweep(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws a bar per point: held-out loss where it was evaluated, else the last phase's loss."""
    done = [row for row in rows if row["status"] == "done"]
    evaluated = bool(done) and all("held_out_loss" in row for row in done)
    values = [row["held_out_loss"] if evaluated else [math.nan, *row["losses"].values()][-1] for row in done]
    names = [row["name"].replace(",", "\n") for row in done]
    lines = sum(1 + name.count("\n") for name in names)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.3 * max(lines, 1)), layout="constrained")
    axis.barh(range(len(done)), [value if math.isfinite(value) else 0.0 for value in values])
    axis.set_yticks(range(len(done)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(title=f"{path.absolute().parent.name}: {len(done)} of {len(rows)} points", xlabel=LOSS_LABELS[evaluated])
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        axis.set_xlim(left=0.95 * min(finite))
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)
