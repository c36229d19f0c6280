"""How far the heads of a layer attend: what is far is lost in a window, and hard for a state of fixed size.

Of a query at position i, a head's softmax gives the key at position j the share p_ij. A head's reach is the mean over queries
of

    share       sum_j p_ij [i - j >= window]         of the attention, from 0 to 1
    distance    sum_j p_ij (i - j)                   tokens

without the first keys of a document, which heads attend to when they have nothing to read ("attention sinks", arXiv
2309.17453). The mean distance of heads is Vig and Belinkov's measure (arXiv 1906.04284); to choose layers by it, or by the
share, is ours. It says where a head attends, not whether anything depends on it.
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

from hybrid_jax.checks import check_boolean, check_choice, check_integer
from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measurement import mean_and_error
from hybrid_jax.evaluate.measures import padded_batches
from hybrid_jax.layers.attention import Attention
from hybrid_jax.layers.mixing import over_blocks
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import is_first, whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parameters import Parameters, join_model, split_model
from hybrid_jax.progress import progress_bar
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.scorers.rows import OnRows

UNITS = {"share": "of the attention", "distance": "tokens"}
QUERIES = 64  # of which the scores are held at a time


@dataclasses.dataclass(frozen=True)
class AttentionDistance(OnRows):
    """Scores a layer by how far its heads attend, the mean of that on text and that on the synthetic task.

    Queries count whose next token counts in the loss: all of a text, those before the answers of the task. Attention is computed
    layer by layer and for a block of queries at a time.

    Args:
      rows, seq_len, task: see `OnRows`.
      window: for `share`, how many tokens back is far.
      measure: `share` of the attention that is far, or mean `distance`.
      sinks: so many first keys of a document do not count.
      per_head: score every head; otherwise a layer's cost is the mean over its heads.
    """

    window: int = 16
    measure: str = "share"
    sinks: int = 1
    per_head: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_integer("select.window", self.window, minimum=1)
        check_choice("select.measure", self.measure, UNITS)
        check_integer("select.sinks", self.sinks, minimum=0)
        check_boolean("select.per_head", self.per_head)

    @property
    def of_heads(self) -> bool:
        """Whether every head has a cost."""
        return self.per_head

    def forward_passes(self, config: ModelConfig) -> float:
        """One; attention is computed once more, in plain blocks."""
        return 1.0

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns the reach of every layer, or of every head."""
        sets = [padded_batches(rows, mesh) for rows in (self.text_rows(corpus), self.task_rows(corpus))]
        with progress_bar(name="select", unit="batch", total=sum(map(len, sets)), shown=is_first()) as bar, in_mesh(mesh):
            (text, text_error), (task, task_error) = (self._reach(model, batches, bar) for batches in sets)
        return Scores((text + task) / 2, UNITS[self.measure], np.hypot(text_error, task_error) / 2)

    def _reach(self, model: Decoder, batches: Sequence[Mapping[str, np.ndarray]], bar) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean over queries and its standard error, [layers, heads] or [layers] each."""
        structure, parameters = split_model(model)
        totals, weights = [], []
        for batch in batches:
            total, weight = _totals(self, structure, parameters, batch)
            totals.append(np.asarray(whole_array(total), np.float64))
            weights.append(np.asarray(whole_array(weight), np.float64))
            bar.update()
        of_rows = np.moveaxis(np.concatenate(totals, axis=1), 1, -1)  # [layers, heads, rows]
        return mean_and_error(of_rows if self.per_head else of_rows.mean(axis=1), np.concatenate(weights))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _totals(
    scorer: AttentionDistance, structure: Any, parameters: Parameters, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns of every row the sum over queries of weight * reach, [layers, B, H], and the sum of weights, [B]."""
    model = join_model(structure, parameters)
    hidden, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])

    def run(layer, hidden):
        reach = _of_layer(scorer, layer.mixer(ATTENTION), layer.mixer_input(hidden), weights=batch["weights"], **at)
        return layer.run(ATTENTION, hidden, **at)[0].hidden, reach

    _, found = model.through_layers(run, hidden)
    return jnp.stack(found), jnp.sum(batch["weights"], axis=1)


def _of_layer(
    scorer: AttentionDistance,
    attention: Attention,
    x: jax.Array,  # [B, T, hidden], normed
    *,
    positions: jax.Array,  # [B, T]
    segment_ids: jax.Array,  # [B, T]
    weights: jax.Array,  # [B, T]
) -> jax.Array:
    """Returns the sum over queries of weight * reach, [B, H] float32."""
    T = x.shape[1]

    def of_block(begin: jax.Array, shares: jax.Array) -> jax.Array:
        """Returns the sum over a block of queries, [B, H], of their shares [B, H, queries, T]; a key that is not seen has none."""
        queries = begin + jnp.arange(shares.shape[2])
        at, weight = (jnp.take(y, queries, axis=1, mode="clip") for y in (positions, weights))
        distance = at[:, :, None] - positions[:, None, :]
        far = distance if scorer.measure == "distance" else distance >= scorer.window
        reach = jnp.where((positions >= scorer.sinks)[:, None], far, 0) * (weight * (queries < T))[:, :, None]
        return jnp.einsum("bhqk,bqk->bh", shares, reach)

    mixing = attention.mixing(x, positions=positions, segment_ids=segment_ids)
    return jnp.sum(over_blocks(of_block, mixing, rows=QUERIES), axis=0)
