"""What each head of attention is worth to a task: its output is set to zero in front of the output projection.

The score of Gather-and-Aggregate (arXiv 2504.18574) and of retrieval-aware distillation (arXiv 2602.11374), which keeps the
best few heads as attention and lets the others become recurrent. Those measure accuracy; here it is the loss of the answers'
tokens, which also tells heads apart where the model is always or never right.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.instruments.heads import answer_rows, sums_without_each_head
from hybrid_jax.evaluate.measurement import mean_and_error
from hybrid_jax.evaluate.measures import batch_size_on
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import is_first
from hybrid_jax.progress import progress_bar
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.scorers.rows import OnRows


@dataclasses.dataclass(frozen=True)
class HeadAblation(OnRows):
    """Scores every head by how much the loss of a task's answers rises without it; text is not read, but for a task's filler.

    Args:
      rows, seq_len, task: see `OnRows`.
    """

    of_heads: ClassVar[bool] = True

    def forward_passes(self, config: ModelConfig) -> float:
        """Of layer l, each head removed and all of them, through layer l and those behind it."""
        return (config.num_heads + 1) * (config.num_layers + 1) / 2

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns the rise of the answers' mean loss without each head, [layers, heads], in nats per token."""
        rows = answer_rows(self.synthetic(corpus), self.rows)
        with progress_bar(name="select", unit="layer", shown=is_first()) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            sums = sums_without_each_head(model, rows, batch_size_on(mesh, self.rows), mesh, report)
        losses, _, weights = np.moveaxis(sums, -1, 0)  # [layers, heads + 1, rows] each
        costs, errors = mean_and_error(losses[:, :-1] - losses[:, -1:], weights[0, 0])  # the last ones are of all heads
        return Scores(costs, "nats", errors)
