"""What a finished run looks like: a table of its phases, and a picture of loss and alignment."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from hybrid_jax.train.metrics import read_metrics

ALIGNED = "mixer_mse/"


def phases_of(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """The logged steps of every phase, in order."""
    found: dict[str, list[dict]] = {}
    for row in read_metrics(workdir):
        found.setdefault(row["phase"], []).append(row)
    return {name: sorted(rows, key=lambda r: r["step"]) for name, rows in found.items()}


def alignment_of(rows: list[dict]) -> dict[int, tuple[float, float]]:
    """Layer -> its mixer's mean squared error at the first and at the last logged step."""
    names = [n for n in rows[0] if n.startswith(ALIGNED)]
    return {int(n.removeprefix(ALIGNED)): (rows[0][n], rows[-1][n]) for n in names}


def report_run(workdir: pathlib.Path):
    """Prints the table and writes `run.png`."""
    phases = phases_of(workdir)
    if not phases:
        return
    table = Table("phase", "steps", "skipped", "loss", "mixer error", "tokens/s", title=str(workdir))
    for name, rows in phases.items():
        first, last, aligned = rows[0], rows[-1], alignment_of(rows).values()
        errors = [f"{sum(e) / len(aligned):.4g}" for e in zip(*aligned, strict=True)]
        table.add_row(
            name,
            f"{last['step']:,}",
            f"{last.get('skipped', 0):.0f}",
            f"{first['loss']:.4f} → {last['loss']:.4f}",
            " → ".join(errors) or "–",
            f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else "–",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    draw_run(phases, workdir / "run.png")


def draw_run(phases: dict[str, list[dict]], path: pathlib.Path):
    """Loss over all phases' steps; beside it every layer's alignment error before and after."""
    aligned = {name: found for name, rows in phases.items() if (found := alignment_of(rows))}
    figure, axes = plt.subplots(1, 1 + len(aligned), figsize=(5.5 * (1 + len(aligned)), 4), constrained_layout=True, squeeze=False)
    begin = 0
    for name, rows in phases.items():
        axes[0, 0].plot([begin + r["step"] for r in rows], [r["loss"] for r in rows], label=name)
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
