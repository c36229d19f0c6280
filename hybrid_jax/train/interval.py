"""Means over the steps between two log lines, summed on the device and saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.train.objective import Mean
from hybrid_jax.train.step import LOSS, STOP

LATEST = ("learning_rate", "skipped", "skipped_in_a_row")  # logged as they are after the interval's last step


@jax.jit
def _sums(metrics: Mapping[str, Any]) -> dict[str, Mean]:
    """Returns a step's metrics as means; a scalar weighs what the step's loss weighs, a skipped step nothing."""
    counts = metrics["skipped_in_a_row"] == 0

    def counted(metric):
        total, weight = metric if isinstance(metric, Mean) else (metric * metrics[LOSS].weight, metrics[LOSS].weight)
        weight = jnp.where(counts, weight, 0.0)
        return Mean(jnp.where(weight > 0, total, 0.0), weight)

    return {name: counted(x) for name, x in metrics.items() if name not in (STOP, *LATEST)}


@jax.jit
def _add(sums: Mapping[str, Mean], metrics: Mapping[str, Any]) -> dict[str, Mean]:
    return jax.tree.map(jnp.add, sums, _sums(metrics))


class Interval:
    """The steps since the last log line.

    A mean is over the accepted steps, each with the weight that the metric had in it: the loss of an interval is that of all its
    tokens, and a metric of some tokens only is the mean over those. A metric without weight in the interval is left out.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Mean] | None = None

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds a step's metrics; does not wait for them."""
        self.sums = _sums(metrics) if self.sums is None else _add(self.sums, metrics)

    def take(self) -> dict[str, Mean]:
        """Returns the sums, for `means`, and begins the next interval."""
        sums, self.sums = self.sums, None
        return sums or {}

    @staticmethod
    def means(sums: Mapping[str, Mean]) -> dict[str, float]:
        """Returns the value of each metric that has any weight; waits for the steps."""
        found = {name: [whole_array(x).astype(np.float64) for x in mean] for name, mean in sums.items()}
        return {name: float(total / weight) for name, (total, weight) in found.items() if weight > 0}

    def state(self) -> dict[str, list[float]]:
        """Returns the sums for a checkpoint: exact, as JSON."""
        return {name: [float(whole_array(x)) for x in mean] for name, mean in (self.sums or {}).items()}

    def set_state(self, state: Mapping[str, list[float]]) -> None:
        """Goes on with the interval that a checkpoint was saved in."""
        self.sums = {name: Mean(*np.asarray(mean, np.float32)) for name, mean in state.items()} or None
