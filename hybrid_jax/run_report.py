"""What a finished run looks like: a table of its phases, and a picture of loss and alignment."""

from __future__ import annotations

import itertools
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from hybrid_jax.train.evaluation import LOSS as HELD_OUT_LOSS
from hybrid_jax.train.metrics import read_metrics

ALIGNED, SOURCE = "mixer_mse/", "loss/"
STYLES = ("--", ":", "-.")  # of the lines of a phase's sources


def phases_of(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """Returns each phase's logged rows in order of their steps; an interval whose steps were all skipped has no losses."""
    found: dict[str, list[dict]] = {}
    for row in read_metrics(workdir):
        found.setdefault(row["phase"], []).append(row)
    return {name: sorted(rows, key=lambda r: r["step"]) for name, rows in found.items()}


def alignment_of(rows: list[dict]) -> dict[int, tuple[float, float]]:
    """Returns layer -> its mixer's mean squared error in the first and in the last logged interval."""
    found = {int(n.removeprefix(ALIGNED)): values for n, (_, values) in curves_of(rows, ALIGNED).items()}
    return {layer: (values[0], values[-1]) for layer, values in sorted(found.items())}


def final_loss(rows: list[dict]) -> float:
    """Returns the loss of the last logged interval with an accepted step; NaN if there is none."""
    return next((row["loss"] for row in reversed(rows) if "loss" in row), math.nan)


def curves_of(rows: list[dict], prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """Returns metric -> (steps, values) of the rows that have it, for the metrics whose names begin with `prefix`."""
    names = sorted({n for row in rows for n in row if n.startswith(prefix)})
    having = {n: [row for row in rows if n in row] for n in names}
    return {n: ([row["step"] for row in found], [row[n] for row in found]) for n, found in having.items()}


def report_run(workdir: pathlib.Path) -> None:
    """Prints the table of a run's phases and writes `run.png`; does nothing for a run without metrics."""
    phases = phases_of(workdir)
    if not phases:
        return
    table = Table("phase", "steps", "skipped", "loss", "mixer error", "tokens/s", title=str(workdir))
    for name, rows in phases.items():
        last, aligned = rows[-1], alignment_of(rows).values()
        _, losses = curves_of(rows, "loss").get("loss", ((), ()))
        errors = [f"{sum(e) / len(aligned):.4g}" for e in zip(*aligned, strict=True)]
        table.add_row(
            name,
            f"{last['step']:,}",
            f"{last.get('skipped', 0):.0f}",
            f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else "–",
            " → ".join(errors) or "–",
            f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else "–",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    draw_run(phases, workdir / "run.png")


def draw_run(phases: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Draws the loss over the steps of all phases, and beside it every layer's alignment error before and after each phase.

    Each phase has its training loss; of a mix also the loss of each source; and the held-out loss of its evaluations, if any.
    """
    aligned = {name: found for name, rows in phases.items() if (found := alignment_of(rows))}
    figure, axes = plt.subplots(1, 1 + len(aligned), figsize=(5.5 * (1 + len(aligned)), 4), constrained_layout=True, squeeze=False)
    begin = 0
    for number, (name, rows) in enumerate(phases.items()):
        curves = curves_of(rows, "loss")
        loss, color = curves.pop("loss", ((), ())), f"C{number}"
        axes[0, 0].plot([begin + step for step in loss[0]], loss[1], label=name, color=color)
        own = curves.items() if len(curves) > 1 else ()
        for (source, (steps, values)), style in zip(own, itertools.cycle(STYLES), strict=False):
            label = f"{name}: {source.removeprefix(SOURCE)}"
            axes[0, 0].plot([begin + step for step in steps], values, style, label=label, color=color, linewidth=1)
        steps, values = curves_of(rows, HELD_OUT_LOSS).get(HELD_OUT_LOSS, ((), ()))
        if values:
            label = f"{name}: held-out"
            axes[0, 0].plot([begin + step for step in steps], values, "o-", label=label, color=color, markersize=3, alpha=0.6)
        begin += rows[-1]["step"]
    axes[0, 0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[0, 0].legend()
    for axis, (name, found) in zip(axes[0, 1:], aligned.items(), strict=True):
        layers = sorted(found)
        for shift, label, n in ((-0.2, "before", 0), (0.2, "after", 1)):
            axis.bar([i + shift for i in range(len(layers))], [found[i][n] for i in layers], 0.4, label=label)
        axis.set(xlabel="layer", ylabel="mixer's mean squared error", yscale="log", title=name)
        axis.set_xticks(range(len(layers)), layers)
        axis.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
