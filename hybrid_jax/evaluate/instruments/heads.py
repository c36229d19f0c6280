"""Which heads a task needs: each head of each mixer is removed in turn (arXiv 2504.18574, 2602.11374)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.data import Corpus
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks import Task
from hybrid_jax.evaluate.instruments.contract import Progress, Subject
from hybrid_jax.evaluate.instruments.of_heads import OfHeads
from hybrid_jax.evaluate.measurement import Measurement, exact, weighted_mean
from hybrid_jax.evaluate.measures import mesh_batches
from hybrid_jax.layers import output_projections
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import Parameters, join_model, split_model


@dataclasses.dataclass(frozen=True)
class Heads(OfHeads):
    """Measures a synthetic task with one head's output set to zero in front of the output projection, for every head.

    Heads of attention and of every recurrent mixer are treated alike; of a head that a hybrid of heads keeps, the outputs of
    attention and of the recurrent mixer are removed together. The measures are `accuracy` of the answers' tokens by the complete
    model; `accuracy`, and by how much the loss of the answers' tokens rises (`loss added`), without each head, at
    {"layer": l, "head": h}; and `chance`, the accuracy of guessing, where the task knows it. The rise is of paired rows: its
    interval does not contain what makes some rows harder than others.

    The layers below the removed head are computed once per batch, those above it once per head: of L layers with H heads a
    batch costs about L H / 2 forward passes.

    Args: see `OfHeads`.
    """

    headline: ClassVar[tuple[str, ...]] = ("accuracy",)

    name: ClassVar[str] = "heads"

    def rows_on(self, corpus: Corpus, count: int) -> list[Row]:
        return answer_rows(self.task_on(corpus), count)

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        config, rows = subject.model.config, self.rows_on(subject.corpus, self.rows)
        L, H = config.num_layers, config.num_heads
        sums = sums_without_each_head(subject.model, rows, self.batch_size, subject.mesh, progress)
        losses, right, weights = np.moveaxis(sums, -1, 0)
        mean, counted = np.divide(right, weights, out=np.zeros_like(right), where=weights > 0), weights[0, H]
        added = np.divide(losses - losses[:, H:], weights, out=np.zeros_like(losses), where=weights > 0)
        measured = [weighted_mean("accuracy", mean[0, H], counted, share=True)]
        if (chance := self.task_on(subject.corpus).chance) is not None:
            measured.append(exact("chance", chance, "share"))
        for layer in range(L):
            for head in range(H):
                accuracy, loss = mean[layer, head], added[layer, head]
                measured.append(weighted_mean("accuracy", accuracy, counted, share=True, layer=layer, head=head))
                measured.append(weighted_mean("loss added", loss, counted, "nats/token", layer=layer, head=head))
        return [m for m in measured if m is not None]


def answer_rows(task: Task, count: int) -> list[Row]:
    """Returns the first rows of a task; only the tokens of answers count."""
    rows = [task.example(i) for i in range(count)]
    return [{**row, "loss_weights": (row["distances"] > 0).astype(np.float32)} for row in rows]


def sums_without_each_head(
    model: Decoder, rows: Sequence[Row], batch_size: int, mesh: Mesh | None = None, progress: Progress = lambda done, total: None
) -> np.ndarray:
    """Runs a model over rows without each head of each layer, and with all of them.

    Args:
      batch_size: rows at a time; the last batch is padded.
      progress: called with the layers of batches that are done, and their number.

    Returns:
      [layers, heads + 1, rows, 3] float64, the last of the heads with none removed; the sums are those of `_without_each_head`.
    """
    (structure, parameters), L = split_model(model), model.config.num_layers
    batches = -(-len(rows) // batch_size)
    sums = np.zeros((L, model.config.num_heads + 1, batches * batch_size, 3))
    with in_mesh(mesh):
        for n, batch in enumerate(mesh_batches(rows, range(len(rows)), batch_size, mesh)):
            hidden, place = None, slice(n * batch_size, (n + 1) * batch_size)
            for layer in range(L):
                found, hidden = _without_each_head(structure, parameters, batch, hidden, np.int32(layer))
                sums[layer, :, place] = np.asarray(whole_array(found), np.float64)
                progress(n * L + layer + 1, batches * L)
    return sums[:, :, : len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _without_each_head(
    structure: Any,
    parameters: Parameters,
    batch: Mapping[str, jax.Array],
    hidden: jax.Array | None,  # [B, T, hidden]
    removed: jax.Array,  # []
) -> tuple[jax.Array, jax.Array]:
    """Runs a model without each head of one layer, and with all of them.

    Args:
      hidden: the model's input of layer `removed`; None: it is layer 0.

    Returns:
      [sum of weight * loss, sum of weight * (the most likely token is right), sum of weight] of every row without each head, and
      with all, [heads + 1, B, 3]; and the model's input of layer `removed` + 1.
    """
    model = join_model(structure, parameters)
    embedded, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
    start, H, weights = embedded if hidden is None else hidden, model.config.num_heads, batch["weights"]

    def without(head):
        def run(layer, carry):
            number, x, after = carry
            for output, heads in output_projections(layer.mixer(layer.spec.kind), layer.spec, H):
                kernel = output.kernel[...]
                kept = (jnp.repeat(jnp.array(heads), kernel.shape[0] // len(heads)) != head) | (number != removed)
                output.kernel.set_value(jnp.where(kept[:, None], kernel, 0))
            x = jax.lax.cond(number < removed, lambda: x, lambda: layer.run(layer.spec.kind, x, **at)[0].hidden)
            return (number + 1, x, jnp.where(number == removed, x, after)), None

        (_, x, after), _ = model.through_layers(run, (jnp.int32(0), start, start))
        x = model.norm(x)
        losses = cross_entropy(x, model.head, batch["targets"])
        right = top_k_tokens(x, model.head, 1)[0][..., 0] == batch["targets"]
        return jnp.stack([jnp.sum(y, axis=1) for y in (losses * weights, right * weights, weights)], axis=1), after

    sums, _ = jax.lax.map(lambda head: (without(head)[0], 0), jnp.arange(H))
    complete, after = without(jnp.int32(H))
    return jnp.concatenate([sums, complete[None]]), after
