"""Means of what the steps since the last logged one measured, summed on the device and saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.train.step import SOURCE_SUMS, STOP, WEIGHT

LATEST = ("learning_rate", "skipped", "skipped_in_a_row")  # not averaged: those of the last step


@jax.jit
def _sums(metrics):
    """Of a step's metrics, each weighed by what its loss is a mean over; zeros if the step was skipped."""
    weight = jnp.where(metrics["skipped_in_a_row"] > 0, 0.0, metrics[WEIGHT])
    sums = {n: weight * x for n, x in metrics.items() if n not in (WEIGHT, SOURCE_SUMS, STOP, *LATEST)}
    sums |= {n: metrics[n] for n in (SOURCE_SUMS,) if n in metrics}
    return {WEIGHT: weight, **{n: jnp.where(weight > 0, x, 0.0) for n, x in sums.items()}}


@jax.jit
def _add(sums, metrics):
    return jax.tree.map(jnp.add, sums, _sums(metrics))


class Interval:
    """The steps since the last logged one.

    A mean is over the steps that counted, each weighing what its loss is a mean over, so that the loss of an interval is that
    of all its tokens. A source's loss, `loss/SOURCE`, is over its own tokens; what had none in the interval is left out.

    Args:
      sources: their names by number, as `make_step` has them.
    """

    def __init__(self, sources: Sequence[str]):
        self.sources, self.sums = tuple(sources), None

    def add(self, metrics: Mapping[str, jax.Array]):
        """Counts a step's metrics in; does not wait for them."""
        self.sums = _sums(metrics) if self.sums is None else _add(self.sums, metrics)

    def take(self) -> dict[str, jax.Array]:
        """The sums, for `means`; the next interval begins."""
        sums, self.sums = self.sums, None
        return sums

    def means(self, sums: Mapping[str, jax.Array]) -> dict[str, float]:
        found = {n: whole_array(x).astype(np.float64) for n, x in sums.items()}
        weight, sources = found.pop(WEIGHT), found.pop(SOURCE_SUMS, ())
        means = {n: float(x / weight) for n, x in found.items()} if weight > 0 else {}
        own = zip(self.sources, sources, strict=False)
        return means | {f"loss/{name}": float(total / of) for name, (total, of) in own if of > 0}

    def state(self) -> dict:
        """For a checkpoint: exact, as JSON."""
        return {} if self.sums is None else {n: whole_array(x).tolist() for n, x in self.sums.items()}

    def set_state(self, state: Mapping):
        self.sums = {n: np.asarray(x, np.float32) for n, x in state.items()} or None
