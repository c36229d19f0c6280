"""Accuracy on a synthetic task whose context is read in chunks and composed, by composition and length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.checks import check_integer
from hybrid_jax.composition import Composition, compose, composed_scores
from hybrid_jax.config import ModelConfig
from hybrid_jax.data import HELD_OUT_SEED, Corpus
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks import Task, check_options
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject, check_counts
from hybrid_jax.evaluate.instruments.recall import answers, measured
from hybrid_jax.evaluate.measurement import Measurement, weighted_mean
from hybrid_jax.evaluate.token_scores import TokenScores
from hybrid_jax.model import Decoder


@dataclasses.dataclass(frozen=True)
class ComposedRecall(Instrument):
    """Measures a synthetic task as `recall` does, with rows longer than the model was trained on, read in chunks (`composition`).

    A row's context ends where it is first asked; what follows, question and answer, is read behind the composed context. So the
    task must ask at the end of its rows: `needles` with `ask = "end"`. The measures are those of `recall`, at each composition
    and length; `accuracy` also at each composition over all lengths.

    Args:
      task: a name of the evaluation's tasks, see `data.corpus.read_tasks`.
      options: replace the task's options.
      compositions: `KEYS:STATES`, see `hybrid_jax.composition`; the chunks are read once for all.
        `full:ordinary` is the ordinary pass.
      lengths: tokens per row.
      chunk: tokens of a chunk at most; a good choice is the length of the rows in training.
      prefix: tokens of the row's beginning that stand before every chunk.
      rows: rows, at every length.
      batch_size: rows at a time.
    """

    headline: ClassVar[tuple[str, ...]] = ("accuracy composition",)

    task: str = "needles"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compositions: tuple[str, ...] = ("concat:soup", "full:ordinary")
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    chunk: int = 1024
    prefix: int = 0
    rows: int = 16
    batch_size: int = 4

    def __post_init__(self):
        check_counts(self, "chunk", "rows", "batch_size")
        check_integer("prefix", self.prefix, minimum=0)
        for length in self.lengths:
            check_integer("lengths", length, minimum=2)
        if not self.lengths or not self.compositions:
            raise ValueError("composed_recall needs at least one of lengths and one of compositions")
        _ = self.made

    @property
    def made(self) -> list[Composition]:
        """The compositions."""
        return [Composition.parse(text, self.chunk) for text in self.compositions]

    def _task(self, corpus: Corpus, length: int) -> Task:
        return corpus.task(self.task, length, HELD_OUT_SEED, held_out=True, **self.options)

    def _begin(self, row: Row, ask_id: int) -> int:
        """Returns where the first question of a row begins, whose answer is the first.

        Raises:
          ValueError: the row has several segments, no answer, or no context.
        """
        if set(row["segment_ids"].tolist()) != {1}:
            raise ValueError(
                f"composed_recall: rows of {self.task!r} are not one document; take a task of one question, as needles"
            )
        first = np.flatnonzero(row["distances"] > 0)[:1]
        asked = np.flatnonzero(row["input_ids"][: int(first[0]) if len(first) else 0] == ask_id)
        if not len(asked):
            raise ValueError(f"composed_recall: a row of {self.task!r} asks nothing; take a task of one question, as needles")
        if asked[-1] <= self.prefix:
            raise ValueError(
                f"composed_recall: a row of {self.task!r} has {asked[-1]} tokens before its question, of which {self.prefix} are "
                "the prefix; give longer rows, a shorter prefix, or the task's option ask = 'end'"
            )
        return int(asked[-1])

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        if self.task not in corpus.tasks:
            raise ValueError(f"composed_recall: no synthetic task is named {self.task!r}; have {', '.join(corpus.tasks)}")
        if mesh is not None:
            raise ValueError("composed_recall runs on one device; leave the mesh out, or the instrument")
        check_options(corpus.tasks[self.task]["task"], self.options)
        for composition in self.made:
            composition.check(config)
        for length in self.lengths:
            row = self._task(corpus, length).example(0)
            begin = self._begin(row, corpus.markers[1])
            for composition in self.made:
                composition.check_positions(config, self.prefix, begin - self.prefix, length - begin)

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        found, right, asked = [], {text: [] for text in self.compositions}, []
        for n, length in enumerate(self.lengths):
            task = self._task(subject.corpus, length)
            rows = [task.example(i) for i in range(self.rows)]

            def report(done: int, n: int = n) -> object:
                return progress(n * self.rows + done, len(self.lengths) * self.rows)

            distances = np.stack([row["distances"] for row in rows])
            asked.append(answers(distances))
            for text, scores in self._scores(subject.model, rows, subject.corpus.markers[1], report).items():
                found += measured(scores, distances, {"composition": text, "tokens": length})
                right[text].append(scores.right)
        over_all = [
            weighted_mean("accuracy", np.concatenate(right[text], 1), np.concatenate(asked, 1), share=True, composition=text)
            for text in self.compositions
        ]
        return [m for m in over_all + found if m is not None]

    def _scores(self, model: Decoder, rows: list[Row], ask_id: int, report: Any) -> dict[str, TokenScores]:
        """Returns the scores of rows of one length by each composition; only those of question and answer are known."""
        begins = np.array([self._begin(row, ask_id) for row in rows])
        ids, weights = (np.stack([row[name] for row in rows]) for name in ("input_ids", "loss_weights"))
        found = {
            text: TokenScores(np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool), weights) for text in self.compositions
        }
        done = 0
        for begin in np.unique(begins):  # rows whose contexts are equally long are read together
            same = np.flatnonzero(begins == begin)
            for at in range(0, len(same), self.batch_size):
                part = same[at : at + self.batch_size]
                batch = ids[np.resize(part, self.batch_size)]  # filled up, so that all batches share a program
                prefix, context, follow = np.split(batch, [self.prefix, begin], axis=1)
                composed = compose(model, context, self.made, prefix=prefix, after=follow.shape[1])
                for text, state in zip(self.compositions, composed, strict=True):
                    losses, right = composed_scores(model, follow, state)
                    found[text].losses[part, begin:], found[text].right[part, begin:] = losses[: len(part)], right[: len(part)]
                done += len(part)
                report(done)
        return found
