"""Sweeps: a grid, or a list, of overrides over experiment configs; run here or as an array job; one table and one picture.

A sweep's directory holds

    sweep.json        what is swept; another sweep in the same directory is refused
    runs/NAME/        each point's working directory (see `experiment`)
    results/NAME.json the outcome of each point
    table.md, results.json, sweep.png
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from hybrid_jax.config_file import flat
from hybrid_jax.files import check_new_directory, new_directory, write_text
from hybrid_jax.report import phases_of

KEYS = {"configs", "grid", "points", "evaluate"}
STOPPED = 3  # the exit code of a run that can be resumed


@dataclasses.dataclass(frozen=True)
class Point:
    """A config file (with its argument after a colon) and the values of its fields that are overridden."""

    config: str
    overrides: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        parts = [re.sub(r"\.py\b", "", pathlib.PurePath(self.config).name), *(f"{k.split('.')[-1]}={v}" for k, v in self.overrides)]
        return re.sub(r"[^\w.=+-]+", "_", ",".join(parts)).strip("_")[:120]

    @property
    def arguments(self) -> list[str]:
        return [f"--config={self.config}", *(f"--config.{k}={v}" for k, v in self.overrides)]


def points_of(config: ConfigDict) -> list[Point]:
    """Every config with every combination of `grid` (its fields, each with a tuple of values) and every one of `points`
    (its fields, each with a value); both nested like the config.

    Raises:
      ValueError: an unknown key, nothing to run, or two points of one name.
    """
    unknown = sorted(set(config) - KEYS)
    if unknown:
        raise ValueError(f"the sweep has the unknown key {unknown[0]!r}; known: {', '.join(sorted(KEYS))}")
    grid = flat(config.get("grid") or {})
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    listed = [flat(p) for p in config.get("points") or [{}]]
    found = [
        Point(str(file), tuple({**one, **other}.items()))
        for file in config.get("configs") or ()
        for one in combined
        for other in listed
    ]
    names = [p.name for p in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if not found or twice:
        raise ValueError(f"two points of the sweep are called {twice!r}" if twice else "the sweep has no configs, or an empty grid")
    return found


def claim(out: pathlib.Path, points: Sequence[Point]):
    """Makes the directory this sweep's.

    Raises:
      ValueError: it is another's.
    """
    text = json.dumps([dataclasses.asdict(p) for p in points], indent=1)
    record = out / "sweep.json"
    if record.exists():
        if json.loads(record.read_text()) != json.loads(text):
            raise ValueError(f"{out} holds another sweep (compare {record}); choose another --out, or remove it")
        return
    check_new_directory(out)
    try:
        with new_directory(out) as directory:
            write_text(directory / "sweep.json", text + "\n")
    except (FileExistsError, OSError):
        if not record.exists():  # another task of the array was first
            raise


def run_point(point: Point, out: pathlib.Path, evaluate: Mapping[str, Any]) -> dict:
    """Runs or finishes a point in a process of its own; its outcome, which is kept unless it was stopped.

    `status` is done, failed (with `error`) or stopped; `losses` the last of each phase; `held_out_loss` and `retrieval`
    where `evaluate` (text, seq_len, rows) says so.
    """
    kept = out / "results" / f"{point.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    workdir = out / "runs" / point.name
    result = {"name": point.name, "config": point.config, "overrides": dict(point.overrides), "status": "done"}
    code, error = _command("prime", *point.arguments, f"--workdir={workdir}")
    if code == 0:
        result["losses"] = {name: rows[-1]["loss"] for name, rows in phases_of(workdir).items()}
        if evaluate:
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in evaluate.items()]
            code, error = _command("evaluate", f"--model=it={workdir / 'model'}", f"--out={workdir / 'evaluation'}", *flags)
        if code == 0 and evaluate:
            (row,) = json.loads((workdir / "evaluation" / "results.json").read_text())
            result |= {"held_out_loss": row["row"]["text_loss"], "retrieval": row["row"]["retrieval_accuracy"]}
    if code:
        result |= {"status": "stopped" if code == STOPPED else "failed", "error": error}
    if result["status"] == "done":
        kept.parent.mkdir(exist_ok=True)
        write_text(kept, json.dumps(result, indent=1) + "\n")
    return result


def _command(*arguments: str) -> tuple[int, str]:
    """(exit code, the last line of its errors)."""
    process = subprocess.Popen([sys.executable, "-m", "hybrid_jax", *arguments], stderr=subprocess.PIPE, text=True)
    last = ""
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    except BaseException:
        process.terminate()  # it saves and ends
        process.wait()
        raise
    return process.wait(), last


def collect(out: pathlib.Path, points: Sequence[Point], results: Mapping[str, dict]) -> list[dict]:
    """Writes the table and the picture of what is there, prints the table; a row a point."""
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
    table = Table(*header, title=str(out))
    for line in cells:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 140).print(table)
    lines = [header, tuple("---" for _ in header), *cells]
    write_text(out / "table.md", "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    draw_sweep(rows, out / "sweep.png")
    return rows


def _number(value, form) -> str:
    return "–" if value is None else format(value, form)


def draw_sweep(rows: Sequence[Mapping], path: pathlib.Path):
    """A bar a point: held-out loss where it was evaluated, else the last phase's loss."""
    done = [row for row in rows if row["status"] == "done"]
    values = [row.get("held_out_loss", list(row["losses"].values())[-1]) for row in done]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.4 * max(len(done), 1)), constrained_layout=True)
    axis.barh([row["name"] for row in done], values)
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss (nats/token)" if done and "held_out_loss" in done[0] else "last loss")
    if values:
        axis.set_xlim(left=0.95 * min(values))
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)
