"""Gradient times error: to first order, what sliding-window attention in a layer's place would add to the loss.

With a = attention(x) and s = the windowed attention of the same weights on the same input, both [B, T, hidden], layer l costs

    sum over tokens of (d loss / d a_l) . (s_l - a_l),

the first term of the Taylor series of what `swa_retrieval` measures, for all layers at once. It is the estimate by which
attribution patching replaces activation patching (N. Nanda, 2023; arXiv 2310.10348) and weights are pruned (arXiv 1611.06440),
here of a mixer. It is computed as the derivative by e_l, at 0, of the loss of a model whose mixers give a_l + e_l (s_l - a_l).
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
from hybrid_jax.selection.scorers.rows import OnRows, beside_windows


@dataclasses.dataclass(frozen=True)
class GradientError(OnRows):
    """Scores a layer by the first-order estimate of the loss that sliding-window attention in its place adds.

    It is right where the error is small; where it is large, the loss bends, and the estimate may even have the wrong sign.

    Args:
      rows, seq_len, task: see `OnRows`.
      window: keys that a query sees in the sliding-window attention, itself included.
    """

    window: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_integer("select.window", self.window, minimum=1)

    def forward_passes(self, config: ModelConfig) -> float:
        """Forward, once more for the gradient (layers keep their input only), and backward, which is two."""
        return 4.0

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns the estimated rise of the mean loss, text plus the synthetic task, in nats per token."""
        sets = [padded_batches(rows, mesh) for rows in (self.text_rows(corpus), self.task_rows(corpus))]
        pair = beside_windows(model, self.window, mesh)
        pair.remat = "full"
        with progress_bar(name="select", unit="batch", total=sum(map(len, sets)), shown=is_first()) as bar, in_mesh(mesh):
            (text, text_error), (task, task_error) = (_rises(pair, batches, bar) for batches in sets)
        return Scores(text + task, "nats", np.hypot(text_error, task_error))


def _rises(pair: Decoder, batches: Sequence[Mapping[str, Any]], bar) -> tuple[np.ndarray, np.ndarray]:
    """Returns the estimated rise of the mean loss and its standard error, [layers] each."""
    structure, parameters = split_model(pair)
    slopes, weights = [], []
    for batch in batches:
        found = _slopes(structure, parameters, batch)
        slopes.append(np.asarray(whole_array(found), np.float64))
        weights.append(np.asarray(whole_array(batch["weights"]), np.float64).sum(axis=1))
        bar.update()
    return mean_and_error(np.concatenate(slopes, axis=1), np.concatenate(weights))


@functools.partial(jax.jit, static_argnums=0)
def _slopes(structure: Any, parameters: Parameters, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the derivative of every row's sum of weight * loss by the share of the windowed output in each layer, [layers, B]."""
    model = join_model(structure, parameters)

    def loss(shares):
        hidden, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])

        def run(layer, carry):
            number, x = carry
            normed = layer.mixer_input(x)
            attention, windowed = (layer.mixer(kind)(normed, **at)[0] for kind in (layer.spec.teaching, layer.spec.kind))
            error = jax.lax.stop_gradient(windowed - attention)
            mixed = attention + (shares[number][:, None, None] * error).astype(attention.dtype)
            return (number + 1, layer.behind_mixer(x, mixed).hidden), None

        (_, hidden), _ = model.through_layers(run, (jnp.int32(0), hidden))
        return jnp.sum(cross_entropy(model.norm(hidden), model.head, batch["targets"]) * batch["weights"])

    return jax.grad(loss)(jnp.zeros((model.config.num_layers, len(batch["weights"]))))
