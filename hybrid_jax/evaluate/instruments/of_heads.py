"""What the instruments of heads share: the rows of a synthetic task that they read, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import HELD_OUT_SEED, Corpus
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks import Task, check_options
from hybrid_jax.evaluate.instruments.contract import Instrument, check_counts, check_rows
from hybrid_jax.mixers import KINDS


@dataclasses.dataclass(frozen=True)
class OfHeads(Instrument):
    """Base of instruments that measure every head on held-out rows of a synthetic task.

    Args:
      task: a name of the evaluation's tasks, see `data.corpus.read_tasks`.
      options: replace the task's options.
      seq_len: tokens per row.
      rows: rows.
      batch_size: rows at a time.
    """

    name: ClassVar[str]
    """The instrument's name, for messages."""

    task: str = "retrieval"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seq_len: int = 512
    rows: int = 32
    batch_size: int = 8

    def __post_init__(self):
        check_counts(self, "seq_len", "rows", "batch_size")

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        if config.is_fused:
            raise ValueError(f"{self.name}: a fused model has two streams; measure the stage after it, or the exported model")
        for layer, spec in enumerate(config.layers):
            options = KINDS[spec.kind].options
            own = config.options(options).own_heads if options else None
            if own not in (None, config.num_heads):
                raise ValueError(
                    f"{self.name}: layer {layer} ({spec.symbol}) has {own} heads, attention {config.num_heads}; the instrument "
                    "numbers the heads of all layers alike, measure this model without it"
                )
        if self.task not in corpus.tasks:
            raise ValueError(f"{self.name}: no synthetic task is named {self.task!r}; have {', '.join(corpus.tasks)}")
        check_options(corpus.tasks[self.task]["task"], self.options)
        check_rows(self.name, config, mesh, self.batch_size, self.seq_len)
        self.rows_on(corpus, 1)

    def task_on(self, corpus: Corpus) -> Task:
        """Returns the task."""
        return corpus.task(self.task, self.seq_len, HELD_OUT_SEED, held_out=True, **self.options)

    def rows_on(self, corpus: Corpus, count: int) -> list[Row]:
        """Returns the first rows of the task, with what the instrument needs of them."""
        raise NotImplementedError
