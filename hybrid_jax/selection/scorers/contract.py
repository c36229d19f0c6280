"""What a scorer is given and what it returns."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.model import Decoder


@dataclasses.dataclass(frozen=True)
class Scores:
    """What converting each layer, or each attention head of each layer, costs. The lowest costs are converted first.

    Args:
      costs: float64 [num_layers], or [num_layers, num_heads] from a scorer of heads. Numbers that are not finite are
        allowed here; choosing a pattern refuses them.
      unit: what the costs are measured in, for messages, e.g. "nats".
      errors: the standard error of every cost, in its shape, where costs are means over sampled data; None: they are not.
    """

    costs: np.ndarray
    unit: str
    errors: np.ndarray | None = None

    def __post_init__(self):
        costs = np.asarray(self.costs, np.float64)
        if costs.ndim not in (1, 2):
            raise ValueError(f"scores must have shape [layers] or [layers, heads], got {list(costs.shape)}")
        object.__setattr__(self, "costs", costs)
        if self.errors is not None and np.shape(self.errors) != costs.shape:
            raise ValueError(f"errors must have the shape of the costs, {list(costs.shape)}, got {list(np.shape(self.errors))}")

    @property
    def of_heads(self) -> bool:
        """True if each head has a cost of its own."""
        return self.costs.ndim == 2

    def per_layer(self) -> list[float]:
        """Returns one cost per layer.

        Raises:
          ValueError: the scores are of heads, which do not say what converting the layer costs.
        """
        if self.of_heads:
            raise ValueError("the scorer scores heads, but a pattern of converted layers needs one score per layer")
        return [float(cost) for cost in self.costs]

    def per_head(self) -> np.ndarray:
        """Returns one cost per head, [layers, heads].

        Raises:
          ValueError: the scores are of layers.
        """
        if not self.of_heads:
            raise ValueError("the scorer scores layers, but a pattern of kept heads needs one score per head")
        return self.costs

    def summed(self) -> np.ndarray:
        """Returns one cost per layer, [layers]: of scores of heads the sum over each layer's heads, as if their costs added up."""
        return self.costs.sum(axis=1) if self.of_heads else self.costs


class Scorer(Protocol):
    """Measures what converting each layer of a model costs.

    A scorer is a frozen dataclass. Its fields are its options: each has a default (a string, an integer, a float or a
    boolean), `config.select.FIELD` sets it, and `__post_init__` raises a ValueError that begins with `select.FIELD` for a bad
    value. A scorer leaves the model unchanged, and in a job of several processes it returns the same scores on each.

    Two further members are optional. `of_heads` (a boolean; absent: false) says whether the scores are of heads; it may depend on
    the options. `forward_passes(config)` returns what scoring costs, in forward passes of the model over the scorer's rows.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def check(self, config: ModelConfig, mesh: Mesh | None) -> None:
        """Checks, before a model is loaded, that a model of this config can be scored on a mesh; None: on one device.

        Raises:
          ValueError, FileNotFoundError: it cannot; the message begins with the option that is wrong, `select.FIELD`.
        """
        ...

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None) -> Scores:
        """Scores every layer.

        Args:
          model: the source, in float32, on the mesh if there is one.
          corpus: tokenized text. Score on `rows` (the training part), and on synthetic rows of `SELECTION_SEED`: evaluations
            measure the held-out part, by which nothing should be chosen.
          mesh: `evaluate.measures.mesh_batches` places rows on it. None: one device.

        Returns:
          A cost for each of the model's layers, or for each of its heads.
        """
        ...


def scores_heads(scorer: Scorer) -> bool:
    """Returns whether a scorer says that its scores are of heads."""
    return bool(getattr(scorer, "of_heads", False))


def forward_passes(scorer: Scorer, config: ModelConfig) -> float | None:
    """Returns how many forward passes of a model a scorer takes for its rows; None: it does not say."""
    count = getattr(scorer, "forward_passes", None)
    return None if count is None else float(count(config))
