"""The published ranking with a cheap score.

One attention layer at a time is replaced by sliding-window attention with the same weights (arXiv 2605.08301, section 3.1,
scores long-context benchmarks; here the score is the mean negative log-likelihood on text plus that on a synthetic task of
recall). A layer's cost is the rise of that loss. Both are rows that no evaluation measures: training text, and synthetic rows
of a seed of their own; otherwise the layers would be chosen by what the hybrid is judged by afterwards.

All replacements run in one compiled program, whose argument is the number of the replaced layer. Until that layer the
replaced model is the source, so each replacement starts from the source's hidden states at its layer:

    layer:                0     1     2     3
    source, replacing 0   *  -> SWA
                          |      \\--> *  -> *  -> *  -> loss
    source, replacing 1   *  -> *  -> SWA -> ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.checks import check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measurement import mean_and_error
from hybrid_jax.evaluate.measures import padded_batches
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.distributed import is_first, whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parameters import Parameters, join_model, split_model
from hybrid_jax.progress import progress_bar
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.scorers.rows import OnRows, beside_windows, no_hidden_states

NONE = -1  # the number of the replaced layer where none is


@functools.partial(jax.jit, static_argnums=0)
def _replace(
    structure: Any,
    parameters: Parameters,
    batch: Mapping[str, jax.Array],
    hidden: jax.Array,  # [B, T, hidden]
    replaced: jax.Array,  # []
) -> tuple[jax.Array, jax.Array]:
    """Runs a model whose layers hold attention and its stand-in, one layer with the stand-in and all others with attention.

    Args:
      hidden: the source's input of layer `replaced`; ignored if `replaced` is NONE.

    Returns:
      Of every row [sum of weight * loss, sum of weight], [B, 2], and the source's input of layer `replaced` + 1.
    """
    model = join_model(structure, parameters)
    embedded, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
    start = jnp.where(replaced == NONE, embedded, hidden)

    def run(layer, carry):
        number, candidate, source = carry

        def through(kind, x):
            return layer.run(kind, x, **at)[0].hidden

        attention, stand_in = layer.spec.teaching, layer.spec.kind
        branches = (
            lambda: (candidate, source),  # layers before the replaced one: their output is given
            lambda: (through(stand_in, candidate), through(attention, source)),
            lambda: (through(attention, candidate), source),
        )
        candidate, source = jax.lax.switch(jnp.sign(number - replaced) + 1, branches)
        return (number + 1, candidate, source), None

    (_, candidate, source), _ = model.through_layers(run, (jnp.int32(0), start, start))
    losses = cross_entropy(model.norm(candidate), model.head, batch["targets"]) * batch["weights"]
    return jnp.stack([jnp.sum(losses, axis=1), jnp.sum(batch["weights"], axis=1)], axis=1), source


@dataclasses.dataclass(frozen=True)
class SwaRetrieval(OnRows):
    """Scores a layer by the loss that sliding-window attention in its place adds on text and on retrieval.

    Args:
      rows, seq_len, task: see `OnRows`.
      window: keys that a query sees in the sliding-window attention, itself included. The published score has 2048 at 32k
        tokens; choose it far below `seq_len`, or replacing a layer changes nothing.
    """

    window: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_integer("select.window", self.window, minimum=1)

    def forward_passes(self, config: ModelConfig) -> float:
        """One of the source; and of layer l's replacement, the two mixers of layer l and one of each layer behind it."""
        return (config.num_layers + 5) / 2

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns the rise of the mean loss, text plus the synthetic task, in nats per token."""
        text, task = (padded_batches(rows, mesh) for rows in (self.text_rows(corpus), self.task_rows(corpus)))
        pair = beside_windows(model, self.window, mesh)
        total = (len(text) + len(task)) * (model.config.num_layers + 1)
        with progress_bar(name="select", unit="layer", total=total, shown=is_first()) as bar, in_mesh(mesh):
            of_text, of_task = (_costs(self._sums(pair, batches, bar)) for batches in (text, task))
        return Scores(of_text[0] + of_task[0], "nats", np.hypot(of_text[1], of_task[1]))

    def _sums(self, model: Decoder, batches: Sequence[Mapping[str, np.ndarray]], bar) -> np.ndarray:
        """Returns the sums of `_replace` of every row, [1 + num_layers, rows, 2]: of the source, and with each layer replaced."""
        structure, parameters = split_model(model)
        sums: list[list[np.ndarray]] = [[] for _ in range(model.config.num_layers + 1)]
        for batch in batches:
            hidden = no_hidden_states(batch["input_ids"], model.config.hidden_size, model.compute_dtype)
            for replaced in range(NONE, model.config.num_layers):
                found, hidden = _replace(structure, parameters, batch, hidden, np.int32(replaced))
                sums[replaced + 1].append(np.asarray(whole_array(found), np.float64))
                bar.update()
        return np.stack([np.concatenate(of_rows) for of_rows in sums])


def _costs(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rise of the mean loss that every replacement causes and its standard error over the rows, [num_layers] each."""
    return mean_and_error(sums[1:, :, 0] - sums[0, :, 0], sums[0, :, 1])
