"""The contract of an objective: what it reads, what it returns, and what a phase has to know about it.

A batch holds what `hybrid_jax.data.layout.training_batch` makes: `input_ids`, `segment_ids`, `positions`, `targets` and
`weights`, [B, T] each, in the mesh's order of tokens, and for some objectives a teacher's cached answers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hybrid_jax.data.layout import TEACHER
from hybrid_jax.model import Decoder

Batch = Mapping[str, jax.Array]
"""name -> [B, T] or [B, T, k]; see `training_batch`."""

INPUTS = ("input_ids", "segment_ids", "positions")
LABELS = ("targets", "weights")


class Mean(NamedTuple):
    """A weighted mean that carries its denominator, so that parts of a batch, and steps, are put together by adding.

    Attributes:
      total: scalar, the sum of weight * value.
      weight: scalar, the sum of the weights; 0 where there was nothing to measure.
    """

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> Mean:
        """Returns the mean of `values` by `weights`, arrays of the same shape."""
        return cls(jnp.sum(values * weights), jnp.sum(weights))

    @property
    def value(self) -> jax.Array:
        """The mean; 0 where nothing was measured."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1.0)

    def __float__(self) -> float:
        return float(self.value)


class TokenLosses(NamedTuple):
    """The loss of every token and its weight, [B, T] each; the loop reports from it the loss of each data source."""

    losses: jax.Array
    weights: jax.Array


class Outcome(NamedTuple):
    """What an objective returns.

    Attributes:
      loss: what is minimized. Gradient accumulation weighs each microbatch by this mean's weight.
      metrics: what else is logged, by name. Each mean has its own denominator (all tokens, answers only, one kind of row), so
        it is right however a batch is divided and however many steps are logged together.
      tokens: the loss token by token; None for a loss that is not a mean over tokens.
    """

    loss: Mean
    metrics: Mapping[str, Mean] = {}
    tokens: TokenLosses | None = None


def mean_over_tokens(losses: jax.Array, weights: jax.Array, metrics: Mapping[str, Mean] | None = None) -> Outcome:
    """Returns the outcome of an objective whose loss is the mean of `losses` by `weights`, [B, T] each."""
    return Outcome(Mean.of(losses, weights), metrics or {}, TokenLosses(losses, weights))


class ObjectiveFunction(Protocol):
    """The loss function of an objective; its options are keyword-only arguments with defaults.

    It is traced by `jax.jit` on the mesh, once for a batch's rows, or once for all microbatches.

    Args:
      model: the model in the phase's form, with repeated layers stacked; gradients are taken of its trainable parameters.
      batch: the arrays that `Objective.reads` names, and no others.
      teacher: for `Objective.two_streams`, the model whose teacher stream is the target, which never changes and takes no
        gradient; None where that is `model`'s own teacher stream (whose parameters are then frozen), and for other objectives.
        Where the phase names a teacher (`Objective.any_teacher`), that model; `model` is then not fused. For `Objective.reference`,
        the model as the phase began; None: as it is now.

    Returns:
      The loss and the metrics.
    """

    def __call__(self, model: Decoder, batch: Batch, teacher: Decoder | None, /) -> Outcome: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it needs: all that the phase, the layout on the mesh, the loop and the planner know about it.

    Args:
      loss: the function.
      reads: names of the arrays of a batch that it gets. One of a teacher's cached answers (`data.layout.TEACHER`) makes the
        phase ask for a `teacher_cache`.
      reference: it compares the model with itself as it was when the phase began, which is kept fixed: what trains is copied before
        the first step, the rest is shared. The phase cannot have form `fused`.
      pairs: its rows are of preference pairs (see `data.packing`), else of documents.
      two_streams: it compares a fused model's two streams. The phase must then have form `fused`, and the teacher is kept fixed:
        whatever trains of the parameters that the teacher reads is copied for it before the first step.
      any_teacher: it compares next-token distributions alone, so that another model than the source may teach (`phase.teacher`).
        The model is then not fused.
      checks: option -> (name, value) -> value, which raises ValueError if the value is bad.
      nothing: values of options that together make the loss 0 everywhere, which is refused.
      conflict: all options -> what is wrong with their values together, in words; empty if nothing is.
    """

    loss: ObjectiveFunction
    reads: tuple[str, ...] = (*INPUTS, *LABELS)
    two_streams: bool = False
    reference: bool = False
    pairs: bool = False
    any_teacher: bool = False
    checks: Mapping[str, Callable[[str, Any], Any]] = dataclasses.field(default_factory=dict)
    nothing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conflict: Callable[[Mapping[str, Any]], str] = lambda options: ""

    def __call__(self, model: Decoder, batch: Batch, teacher: Decoder | None = None, **options: Any) -> Outcome:
        """Computes the loss of a batch, of which the function gets what the objective declares."""
        function: Callable[..., Outcome] = self.loss
        return function(model, {name: batch[name] for name in self.reads}, teacher, **options)

    @property
    def teacher_cache(self) -> bool:
        """Whether it reads a teacher's cached answers (`cache-teacher` makes them)."""
        return not set(TEACHER).isdisjoint(self.reads)

    @property
    def options(self) -> dict[str, Any]:
        """The options' names, in the order of the function's arguments, and their defaults."""
        bound = self.loss.keywords if isinstance(self.loss, functools.partial) else {}
        arguments = inspect.signature(self.loss).parameters.items()
        return {n: p.default for n, p in arguments if p.kind == p.KEYWORD_ONLY and n not in bound}
