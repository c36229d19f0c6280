"""What one sees of a run: tensorboardX, the same numbers as JSON lines, a progress bar."""

from __future__ import annotations

import json
import pathlib
import sys

import tensorboardX
from tqdm import tqdm

from hybrid_jax.parallel.distributed import is_first


class MetricWriter:
    """Scalars to `DIR/tensorboard` and `DIR/metrics.jsonl`."""

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.board = tensorboardX.SummaryWriter(str(directory / "tensorboard"))
        self.lines = (directory / "metrics.jsonl").open("a")

    def write(self, phase: str, step: int, metrics: dict[str, float]):
        for name, value in metrics.items():
            self.board.add_scalar(f"{phase}/{name}", value, step)
        self.lines.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")
        self.lines.flush()

    def close(self):
        self.board.close()
        self.lines.close()


class NoMetrics:
    """What the processes after the first write."""

    def write(self, phase: str, step: int, metrics: dict[str, float]):
        pass

    def close(self):
        pass


def read_metrics(directory: pathlib.Path) -> list[dict]:
    """The lines of `metrics.jsonl`; of a step written twice (a resumed run) the last."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(r["phase"], r["step"]): r for r in rows}.values())


def progress_bar(name: str, steps: int, done: int) -> tqdm:
    """A bar in steps, with what is left; one line now and then where nobody watches a terminal."""
    interval = 0.5 if sys.stderr.isatty() else 30
    disable = not is_first()
    return tqdm(total=steps, initial=done, desc=name, unit="step", mininterval=interval, dynamic_ncols=True, disable=disable)
