"""Sweeps: a grid, or a list, of overrides over experiment configs; run here or as an array job; one table and one picture.

A sweep's directory holds

    sweep.json        what is swept and how it is evaluated; another sweep in the same directory is refused
    runs/NAME/        each point's working directory (see `experiment`)
    results/NAME.json the outcome of each point; one that failed runs again with the same command
    table.md, results.json, sweep.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Column, Table

from hybrid_jax.checks import check_known
from hybrid_jax.config_file import flat
from hybrid_jax.files import check_new_directory, new_directory, write_text
from hybrid_jax.run_report import final_loss, phases_of

KEYS = {"configs", "grid", "points", "evaluate"}
EVALUATE_KEYS = {"text", "seq_len", "rows"}
STOPPED = 3  # the exit code of a run that can be resumed
LOSS_LABELS = {True: "held-out loss (nats/token)", False: "last loss of the last phase"}
LONGEST_NAME = 100  # characters; file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
      name: of its directory and of its row; says what distinguishes it from the sweep's other points.
      config: a config file, with its argument after a colon.
      overrides: (field of the config, value), e.g. `("phases.align.steps", 60)`.
    """

    name: str
    config: str
    overrides: tuple[tuple[str, Any], ...]

    @property
    def arguments(self) -> list[str]:
        return [f"--config={self.config}", *(f"--config.{k}={v}" for k, v in self.overrides)]


def points_of(config: ConfigDict) -> list[Point]:
    """Every config with every combination of `grid` (its fields, each with a tuple of values) and every one of `points`
    (its fields, each with a value); both nested like the config.

    Raises:
      ValueError: an unknown key, nothing to run, or the same point twice.
    """
    check_known("the sweep", config, KEYS)
    check_known("sweep.evaluate", config.get("evaluate") or {}, EVALUATE_KEYS)
    grid = flat(config.get("grid") or {})
    single = next((k for k, v in grid.items() if not isinstance(v, (tuple, list))), None)
    if single:
        raise ValueError(
            f"sweep.grid.{single} must be a tuple of values, got {grid[single]!r}; for one value write ({grid[single]!r},)"
        )
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    listed = [flat(p) for p in config.get("points") or [{}]]
    files = config.get("configs") or ()
    if isinstance(files, str):
        raise ValueError(f"sweep.configs must be a tuple of files, got {files!r}; for one file write ({files!r},)")
    found = [(str(file), {**one, **other}) for file in files for one in combined for other in listed]
    if not found:
        raise ValueError("the sweep has no configs, or an empty grid")
    twice = next((pair for i, pair in enumerate(found) if pair in found[:i]), None)
    if twice:
        raise ValueError(f"the sweep has the same point twice: {twice[0]} with {twice[1]}")
    names = _names(found)
    return [Point(name, file, tuple(fields.items())) for name, (file, fields) in zip(names, found, strict=True)]


def _names(points: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A name for each (config, overrides): the config where there are several, and the fields whose values differ.

    A field is called by the shortest end of its path that no other such field has. A long name ends in a hash instead.
    """
    missing = object()
    fields = dict.fromkeys(k for _, overrides in points for k in overrides)
    varying = [k for k in fields if len({repr(o.get(k, missing)) for _, o in points}) > 1]
    ends = {k: ["_".join(k.split(".")[-n:]) for n in range(1, k.count(".") + 2)] for k in varying}
    short = {k: next((e for e in ends[k] if sum(e in other for other in ends.values()) == 1), ends[k][-1]) for k in varying}
    several = len({file for file, _ in points}) > 1 or not varying
    names = []
    for file, overrides in points:
        stem = re.sub(r"\.py\b", "", pathlib.PurePath(file).name)
        parts = [stem] * several + [f"{short[k]}={overrides[k]}" for k in varying if k in overrides]
        names.append(re.sub(r"[^\w.=+-]+", "_", ",".join(parts)).strip("_") or "default")
    return [
        name if len(name) <= LONGEST_NAME and names.count(name) == 1 else f"{name[: LONGEST_NAME - 9]}-{_hash(point)}"
        for name, point in zip(names, points, strict=True)
    ]


def _hash(point) -> str:
    return hashlib.sha256(repr(point).encode()).hexdigest()[:8]


def claim(out: pathlib.Path, points: Sequence[Point], configs: Sequence[ConfigDict], evaluate: Mapping[str, Any]):
    """Makes the directory this sweep's.

    Args:
      configs: each point's config with its overrides. The results of a directory are of one version of them; meshes may change.
      evaluate: how the points are evaluated.

    Raises:
      ValueError: it is another's; names a difference.
    """
    described = [{**dataclasses.asdict(p), "fields": _described(c)} for p, c in zip(points, configs, strict=True)]
    text = json.dumps({"evaluate": dict(evaluate), "points": described}, indent=1, default=list)
    record = out / "sweep.json"
    if record.exists():
        difference = _difference(json.loads(record.read_text()), json.loads(text))
        if difference:
            raise ValueError(f"{out} holds another sweep: {difference} (compare {record}); choose another --out, or remove it")
        return
    check_new_directory(out)
    try:
        with new_directory(out) as directory:
            write_text(directory / "sweep.json", text + "\n")
    except (FileExistsError, OSError):
        if not record.exists():  # another task of the array was first
            raise


def _described(config: ConfigDict) -> dict[str, Any]:
    """The fields of a point's config, without meshes, which change nothing that is compared."""
    return {name: value for name, value in flat(config.to_dict()).items() if "mesh" not in name.split(".")}


def _difference(old: Any, new: Mapping[str, Any]) -> str:
    """One difference between two sweeps in words; empty if there is none."""
    if not isinstance(old, dict) or [p["name"] for p in old["points"]] != [p["name"] for p in new["points"]]:
        return "its points are not these"
    groups = [("sweep.evaluate", old["evaluate"], new["evaluate"])]
    for was, now in zip(old["points"], new["points"], strict=True):
        if was["config"] != now["config"]:
            return f"{now['name']} is of {now['config']} now and was of {was['config']}"
        groups.append((f"{now['name']}: config", was["fields"], now["fields"]))
    for where, was, now in groups:
        for name in sorted({*was, *now}):
            if (name in was) != (name in now) or was[name] != now[name]:
                return f"{where}.{name} is {now.get(name, 'absent')!r} now and was {was.get(name, 'absent')!r}"
    return ""


def run_point(point: Point, out: pathlib.Path, evaluate: Mapping[str, Any]) -> dict:
    """Runs or finishes a point in a process of its own; its outcome, which is kept unless it was stopped; a failed one runs again.

    `status` is done, failed (with `error`) or stopped; `losses` the last of each phase; `held_out_loss` and `retrieval`
    where `evaluate` (text, seq_len, rows) says so.
    """
    kept = out / "results" / f"{point.name}.json"
    if kept.exists() and (result := json.loads(kept.read_text()))["status"] == "done":
        return result
    workdir = out / "runs" / point.name
    result = {"name": point.name, "config": point.config, "overrides": dict(point.overrides), "status": "done"}
    status, error = _command("prime", *point.arguments, f"--workdir={workdir}")
    if status == "done":
        result["losses"] = {name: final_loss(rows) for name, rows in phases_of(workdir).items()}
        if evaluate:
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in evaluate.items()]
            status, error = _command("evaluate", f"--model=it={workdir / 'model'}", f"--out={workdir / 'evaluation'}", *flags)
    if status == "done" and evaluate:
        (row,) = json.loads((workdir / "evaluation" / "results.json").read_text())
        result |= {"held_out_loss": row["row"]["text_loss"], "retrieval": row["row"]["retrieval_accuracy"]}
    if status != "done":
        result |= {"status": status, "error": error}
    if status != "stopped":
        kept.parent.mkdir(exist_ok=True)
        write_text(kept, json.dumps(result, indent=1) + "\n")
    return result


def _command(*arguments: str) -> tuple[str, str]:
    """Runs a command to its end: (`done`, `failed` or `stopped`, the last line of its errors).

    While it runs, SIGINT and SIGTERM to this process become one SIGTERM to the command, which then saves and ends; this
    process waits for it. A second SIGINT kills it. (A signal to the process group reaches the command directly as well,
    which changes nothing.)
    """
    process = subprocess.Popen([sys.executable, "-m", "hybrid_jax", *arguments], stderr=subprocess.PIPE, text=True)
    last = ""
    with _passing_signals(process) as received:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
        code = process.wait()
    if code == 0:
        return ("stopped" if received else "done"), "stopped between two commands" if received else ""
    if code < 0:
        last = f"ended by {signal.Signals(-code).name}, after: {last}"
    return ("stopped" if received or code == STOPPED else "failed"), last


@contextlib.contextmanager
def _passing_signals(process: subprocess.Popen) -> Iterator[list[int]]:
    """The signals received in this block, in order; see `_command`. Other threads than the main one leave signals alone."""
    received: list[int] = []

    def handle(number, _):
        if number == signal.SIGINT and signal.SIGINT in received:
            process.kill()
        elif not received:
            print(
                "sweep: waiting until the running point has saved its state; Ctrl-C again ends it at once",
                file=sys.stderr,
                flush=True,
            )
            process.terminate()
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    table = Table(*(Column(name, overflow="fold") for name in header), title=str(out))
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
