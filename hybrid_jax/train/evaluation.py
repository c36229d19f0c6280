"""Evaluation during training: held-out loss of each data source, and retrieval accuracy, on the phase's mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.data import HELD_OUT_SEED, Corpus
from hybrid_jax.evaluate.measures import BLOCK, PAIRS, batch_sums, evenly_spaced, mesh_batches
from hybrid_jax.parallel.distributed import say, whole_array
from hybrid_jax.parameters import split_model
from hybrid_jax.train.hook import EVAL, EVALUATION, Hook, StepView
from hybrid_jax.train.objective import Mean
from hybrid_jax.train.objectives import OBJECTIVES, make_objective

if TYPE_CHECKING:
    from hybrid_jax.train.phase import Phase

LOSS = f"{EVAL}/loss"  # the mean of the sources' held-out losses by their shares of the phase's rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outcome(layout: Any, objective: Any, trainable: Any, frozen: Any, batch: Any) -> dict[str, Mean]:
    """Returns the loss and the metrics of an objective, as training computes them."""
    model, teacher = layout.models(trainable, frozen)
    loss, metrics, _ = objective(model, batch, teacher)
    return {"loss": loss, **metrics}


class Evaluation(Hook):
    """Logs `eval/loss/SOURCE` for each source of text in the mix, their mean `eval/loss`, and `eval/retrieval` (accuracy).

    Of preference pairs the loss is the objective's, and `eval/METRIC/SOURCE` are its metrics.

    The rows are the same at every call and on every mesh: evenly spaced rows of each held-out part, and retrieval blocks of a
    seed of their own. Retrieval is measured where a row has room for a block.

    Raises:
      ValueError: no source's held-out part fills a row.
    """

    name = EVALUATION

    def __init__(self, phase: Phase, corpus: Corpus, mix: Mapping[str, float], mesh: Mesh | None):
        super().__init__(phase.eval_every)
        self.mesh, self.size, self.length = mesh, phase.rows_at_a_time, phase.seq_len
        texts = {n: share for n, share in mix.items() if share and n in corpus.held_out}
        self.shares = texts or dict.fromkeys(corpus.texts, 1.0)
        self.pairs = OBJECTIVES[phase.objective].pairs
        self.objective = make_objective(phase.objective, phase.options)
        self.sets: dict[str, tuple[Any, list[int]]] = {}
        problem = ""
        for source in self.shares:
            try:
                rows = corpus.held_out_rows(self.length, source, self.pairs)
                self.sets[source] = rows, evenly_spaced(len(rows), phase.eval_rows)
            except ValueError as e:
                problem = str(e)
                say(f"{source} is not evaluated: {e}")
        if not self.sets:
            raise ValueError(f"phase.eval_every is {phase.eval_every}, but nothing can be evaluated: {problem}")
        self.retrieval = None
        if self.length >= BLOCK:
            task = corpus.task("retrieval", self.length, HELD_OUT_SEED, min_pairs=PAIRS, max_pairs=PAIRS)
            self.retrieval = task, list(range(phase.eval_rows))

    def __call__(self, view: StepView) -> dict[str, float]:
        structure, parameters = split_model(view.model)

        def measure(rows, indices):
            total = np.zeros(3)
            for batch in mesh_batches(rows, indices, self.size, self.mesh):
                total += np.asarray(whole_array(batch_sums(structure, parameters, batch)), np.float64)
            return total

        preferences = {}
        if self.pairs:
            preferences = {name: self._preferences(view, *rows) for name, rows in self.sets.items()}
            losses = {name: found["loss"] for name, found in preferences.items()}
        else:
            sums = {name: measure(*rows) for name, rows in self.sets.items()}
            losses = {name: float(loss / weight) for name, (loss, _, weight) in sums.items() if weight > 0}
        shares = sum(self.shares[name] for name in losses)
        values = {f"{LOSS}/{name}": loss for name, loss in losses.items()}
        values |= {f"{EVAL}/{metric}/{name}": x for name, found in preferences.items() for metric, x in found.items()}
        if losses:
            values[LOSS] = sum(self.shares[name] * loss for name, loss in losses.items()) / shares
        if self.retrieval is not None:
            _, right, weight = measure(*self.retrieval)
            values[f"{EVAL}/retrieval"] = float(right / weight)
        return values

    def _preferences(self, view: StepView, rows: Any, indices: list[int]) -> dict[str, float]:
        """Returns the mean loss and metrics of the objective over the pairs of these rows."""
        found: dict[str, np.ndarray] = {}
        for batch in mesh_batches(rows, indices, self.size, self.mesh):
            means = _outcome(view.layout, self.objective, view.state.trainable, view.frozen, batch)
            for name, mean in means.items():
                found[name] = found.get(name, 0) + np.array([whole_array(x) for x in mean], np.float64)
        return {name: float(total / weight) for name, (total, weight) in found.items()}
