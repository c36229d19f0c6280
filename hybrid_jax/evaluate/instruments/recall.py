"""Accuracy on a synthetic task: over all answers, by distance to the evidence, and over a grid of the task's options."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import HELD_OUT_SEED, Corpus
from hybrid_jax.data.tasks import Task, check_options
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject, check_counts, check_rows
from hybrid_jax.evaluate.measurement import Measurement, buckets, weighted_mean
from hybrid_jax.evaluate.token_scores import TokenScores, token_scores

SEQ_LEN = "seq_len"


@dataclasses.dataclass(frozen=True)
class Recall(Instrument):
    """Measures a synthetic task by teacher forcing: is each token of an answer the most likely one, given the true tokens before?

    The measures are `accuracy` (of the answers' tokens), `exact` (of complete answers) and `loss` (of the answers' tokens);
    without a grid also `accuracy` at {"distance": d}, over answers whose evidence is up to d tokens back and more than the next
    smaller d. With a grid every measure is at each of its points, and `accuracy` also over all of them.

    Args:
      task: a name of the evaluation's tasks, see `data.corpus.read_tasks`.
      options: replace the task's options.
      grid: option -> values; all combinations are measured. `seq_len` counts as an option; several options that get the same
        value are joined by commas (`"min_pairs,max_pairs": (4, 8, 16)`, named `pairs` in the results).
      seq_len: tokens per row.
      rows: rows, at every point of the grid.
      batch_size: rows at a time.
    """

    headline: ClassVar[tuple[str, ...]] = ("accuracy",)

    task: str = "retrieval"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    seq_len: int = 1024
    rows: int = 64
    batch_size: int = 8

    def __post_init__(self):
        check_counts(self, "seq_len", "rows", "batch_size")
        if empty := [name for name, values in self.grid.items() if not len(values)]:
            raise ValueError(f"recall: the grid has no values for {empty[0]!r}")

    def points(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Returns the points of the grid: where each is for a reader, and the options that it sets."""
        found = []
        for values in itertools.product(*self.grid.values()):
            at, options = {}, {}
            for names, value in zip(self.grid, values, strict=True):
                split = [name.strip() for name in names.split(",")]
                at[split[-1].removeprefix("max_")] = value
                options |= dict.fromkeys(split, value)
            found.append((at, options))
        return found

    def _task(self, corpus: Corpus, options: Mapping[str, Any]) -> Task:
        """Returns the rows at a point of the grid.

        Raises:
          ValueError: an option is out of range, or a row has no room for the task.
        """
        given = {**self.options, **options}
        return corpus.task(self.task, given.pop(SEQ_LEN, self.seq_len), HELD_OUT_SEED, held_out=True, **given)

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        if self.task not in corpus.tasks:
            raise ValueError(f"recall: no synthetic task is named {self.task!r}; have {', '.join(corpus.tasks)}")
        asked = {*self.options, *(name for _, options in self.points() for name in options)} - {SEQ_LEN}
        check_options(corpus.tasks[self.task]["task"], asked)
        for _, options in self.points():
            task = self._task(corpus, options)
            check_rows("recall", config, mesh, self.batch_size, task.length)
            task.example(0)  # refuses held-out text that fills no row

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        found, points, right, asked = [], self.points(), [], []
        for n, (at, options) in enumerate(points):
            task = self._task(subject.corpus, options)
            rows = [task.example(i) for i in range(self.rows)]

            def report(done: int, n: int = n) -> object:
                return progress(n * self.rows + done, len(points) * self.rows)

            scores = token_scores(subject.model, rows, mesh=subject.mesh, batch_size=self.batch_size, progress=report)
            distances = np.stack([row["distances"] for row in rows])
            found += measured(scores, distances, at)
            right.append(scores.right)
            asked.append(answers(distances))
            if not self.grid:
                for low, high in buckets(task.length - 1):
                    inside = ((distances > low) & (distances <= high)).astype(np.float32)
                    found.append(weighted_mean("accuracy", scores.right, inside, share=True, distance=high))
        if self.grid:  # rows of one number have the same random numbers at all points: together they are one sample
            found.insert(0, weighted_mean("accuracy", np.concatenate(right, 1), np.concatenate(asked, 1), share=True))
        return [m for m in found if m is not None]


def answers(distances: np.ndarray) -> np.ndarray:
    """Returns 1 at the tokens of answers, which have evidence, else 0; [rows, T] float32."""
    return (distances > 0).astype(np.float32)


def measured(scores: TokenScores, distances: np.ndarray, at: Mapping[str, Any]) -> list[Measurement | None]:
    """Returns `accuracy`, `exact` and `loss` of rows whose answers are where distances [rows, T] are positive, at a place."""
    asked = answers(distances)
    begins = asked * (np.pad(asked[:, :-1], ((0, 0), (1, 0))) == 0)
    return [
        weighted_mean("accuracy", scores.right, asked, share=True, **at),
        weighted_mean("exact", _complete(scores.right, distances > 0), begins, share=True, **at),
        weighted_mean("loss", scores.losses, asked, "nats/token", **at),
    ]


def _complete(right: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Returns, at the first token of every answer (a run of consecutive places), whether all its tokens are right; [rows, T]."""
    complete = np.zeros(right.shape, bool)
    follows = np.ones(len(right), bool)  # whether the answer's tokens after this place are right
    for t in reversed(range(right.shape[1])):
        follows = np.where(answers[:, t], follows & right[:, t], True)
        complete[:, t] = follows & answers[:, t]
    return complete
