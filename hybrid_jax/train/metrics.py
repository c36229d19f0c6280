"""What is measured of a run and where it goes: tensorboardX, the same as JSON lines, a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import optax
import tensorboardX
import tqdm

from hybrid_jax import progress
from hybrid_jax.mixers import KINDS
from hybrid_jax.parallel.distributed import is_first

GROUPS = {
    "embedding": re.compile(r"embed_tokens|lm_head"),
    "norm": re.compile(r"^norm\.|layernorm"),
    "mlp": re.compile(r"\.mlp\."),
    "attention": re.compile(r"\.self_attn\."),
}


def gradient_norms(grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`grad_norm`, and of every group of parameters that trains `grad_norm/GROUP`."""
    keys = {row.parameter_key for row in KINDS.values()}
    groups: dict[str, list] = {}
    for name, g in grads.items():
        mixer = not keys.isdisjoint(name.split("."))
        group = next((group for group, found in GROUPS.items() if found.search(name)), "mixer" if mixer else "other")
        groups.setdefault(group, []).append(g)
    return {"grad_norm": optax.tree.norm(grads), **{f"grad_norm/{n}": optax.tree.norm(g) for n, g in groups.items()}}


class MetricWriter:
    """Scalars to `DIR/tensorboard` and `DIR/metrics.jsonl`."""

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.board = tensorboardX.SummaryWriter(str(directory / "tensorboard"))
        self.lines = (directory / "metrics.jsonl").open("a")
        if self.lines.tell() and not (directory / "metrics.jsonl").read_bytes().endswith(b"\n"):
            self.lines.write("\n")  # a killed run's last line

    def write(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):  # the JSON lines have the others
                self.board.add_scalar(f"{phase}/{name}", value, step)
        self.lines.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")
        self.lines.flush()

    def close(self) -> None:
        self.board.close()
        self.lines.close()


class NoMetrics:
    """What the processes after the first write."""

    def write(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(directory: pathlib.Path) -> list[dict]:
    """Returns the values of every logged step, from `metrics.jsonl`; a step's lines are merged, and of a value written twice (by a
    resumed run) the last counts. Torn lines (of a killed run) are left out."""
    path = directory / "metrics.jsonl"
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            key = row["phase"], row["step"]
            rows[key] = {**rows.get(key, {}), **row}
    return list(rows.values())


def progress_bar(name: str, steps: int, done: int) -> tqdm.tqdm:
    """A bar in steps, on the first process."""
    return progress.progress_bar(name=name, unit="step", total=steps, done=done, shown=is_first())
