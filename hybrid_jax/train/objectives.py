"""Objectives: small functions (model, batch, teacher, **options) -> (loss, metrics), and what each of them needs.

A batch is what `hybrid_jax.data.layout.training_batch` makes: `input_ids`, `segment_ids`, `positions`, `targets`
and `weights`, [B,T] each, in the mesh's order of tokens. Of the metrics `weight` says what the loss is a mean over, so that
parts of a batch can be put together again, and `PER_TOKEN`, where there is one, holds every token's loss and weight [B,T].
A teacher never changes: see `Objective.two_streams`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.checks import check_boolean, check_choice, check_number
from hybrid_jax.model import Decoder, LayerOutputs
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.divergence import KINDS, divergence, top_k_divergence

PER_TOKEN = "per_token"


def _weighted_mean(losses, weights):
    """Over all tokens, and what it weighs: the sum of the weights."""
    weight = jnp.sum(weights)
    return jnp.sum(losses * weights) / jnp.where(weight > 0, weight, 1.0), weight


def next_token(model: Decoder, batch, teacher: Decoder | None = None):
    """Weighted mean next-token cross-entropy: of text, or of what an assistant says (the data's weights make it SFT)."""
    del teacher
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    losses = cross_entropy(hidden, model.head_kernel, batch["targets"])
    loss, weight = _weighted_mean(losses, batch["weights"])
    return loss, {"loss": loss, "weight": weight, PER_TOKEN: (losses, batch["weights"])}


def distill(
    model: Decoder,
    batch,
    teacher: Decoder | None = None,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    next_token_weight: float = 0.0,
):
    """The student's next-token distribution against the teacher's (arXiv 2408.15237, 2502.20339).

    loss = divergence_weight * temperature^2 * KL + next_token_weight * cross-entropy, weighted means over tokens.

    Args:
      model: a fused one.
      teacher: whose the teacher stream is; None: the model's own, whose parameters are frozen.
      kind: `forward` KL(teacher | student) or `reverse`, KL(student | teacher).
      temperature: divides both models' logits.
    """
    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])
    streams = model.two_streams(*at, compare=lambda t, s: (), teacher=teacher)
    head = (teacher or model).head_kernel
    found = divergence(streams.student, model.head_kernel, streams.teacher, head, kind=kind, temperature=temperature)
    return _mixed(model, batch, streams.student, found, divergence_weight * temperature**2, next_token_weight)


def distill_cached(model: Decoder, batch, teacher=None, *, divergence_weight: float = 1.0, next_token_weight: float = 0.0):
    """`distill`, forward, of a teacher whose likeliest tokens the batch holds: `teacher_ids`, `teacher_log_probabilities`."""
    del teacher
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    found = top_k_divergence(hidden, model.head_kernel, batch["teacher_ids"], batch["teacher_log_probabilities"])
    return _mixed(model, batch, hidden, found, divergence_weight, next_token_weight)


def _mixed(model, batch, hidden, found, divergence_weight, next_token_weight):
    mean, weight = _weighted_mean(found, batch["weights"])
    loss, metrics, losses = divergence_weight * mean, {"divergence": mean}, divergence_weight * found
    if next_token_weight:
        entropies = cross_entropy(hidden, model.head_kernel, batch["targets"])
        metrics["next_token"], _ = _weighted_mean(entropies, batch["weights"])
        loss, losses = loss + next_token_weight * metrics["next_token"], losses + next_token_weight * entropies
    return loss, {"loss": loss, "weight": weight, PER_TOKEN: (losses, batch["weights"]), **metrics}


def _mse(student, teacher, real):
    """[B,T]: every real token's mean square over its elements, in float32, 0 at padding; the teacher takes no gradient.

    Args:
      student, teacher: [B,T,hidden].
      real: [B,T] bool, False at padding.
    """
    error = jnp.square(student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32))
    return jnp.mean(jnp.where(real[..., None], error, 0), axis=-1)


# hybrid-model-factory's `hybrid_lw_distill_target`: the parts of `LayerOutputs` whose errors are added to a layer's loss.
ALIGN_TARGETS = {
    "decoder": ("hidden",),
    "mixer": ("mixer",),
    "residuals": ("mixer", "mlp"),
    "all": ("mixer", "mlp", "hidden"),
    "none": (),
}


def align(model: Decoder, batch, teacher: Decoder | None = None, *, target: str, pre_lm_head: bool = True):
    """Stage 1 of Priming (arXiv 2605.08301): the student stream imitates the teacher's.

    loss = sum over layers of target(layer) / number of layers + MSE(final normed states) if `pre_lm_head`. Every mean is over
    the elements of real tokens: padding (segment 0) counts for nothing.
    Metrics hold every layer's mixer error, `mixer_mse/N`, whatever the target.

    Args:
      model: a fused one.
      teacher: whose the teacher stream is; None: the model's own, whose parameters are frozen.
      target: a key of `ALIGN_TARGETS`.
    """
    real = batch["segment_ids"] > 0
    weights = real.astype(jnp.float32)

    def compare(taught: LayerOutputs, student: LayerOutputs):
        parts = dict.fromkeys(("mixer", *ALIGN_TARGETS[target]))  # in an order that every process has
        errors = {part: _mse(getattr(student, part), getattr(taught, part), real) for part in parts}
        of_layer = sum((errors[part] for part in ALIGN_TARGETS[target]), jnp.zeros(real.shape))
        return of_layer, _weighted_mean(errors["mixer"], weights)[0]

    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])
    streams = model.two_streams(*at, compare, teacher)
    losses = sum(of_layer for of_layer, _ in streams.layers) / len(streams.layers)
    final = _mse(streams.student, streams.teacher, real)
    if pre_lm_head:
        losses = losses + final
    loss, weight = _weighted_mean(losses, weights)
    metrics = {"loss": loss, "weight": weight, PER_TOKEN: (losses, weights), "pre_lm_head_mse": _weighted_mean(final, weights)[0]}
    for i, (_, mixer) in enumerate(streams.layers):
        if not model.config.layers[i].shared:
            metrics[f"mixer_mse/{i:02d}"] = mixer
    return loss, metrics


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it needs.

    Args:
      loss: (model, batch, teacher, **options) -> (loss, metrics); its options are its keyword-only arguments.
      two_streams: it compares a fused model's two streams. Then it gets as teacher a model that does not change, or None where
        that is the model's own frozen part.
      teacher_cache: it reads a teacher's answers from the batch (`cache-teacher` makes them).
      checks: option -> (name, value) -> value, raises ValueError if the value is bad.
      nothing: values of options that together make the loss 0 everywhere.
    """

    loss: Callable
    two_streams: bool = False
    teacher_cache: bool = False
    checks: Mapping[str, Callable[[str, Any], Any]] = dataclasses.field(default_factory=dict)
    nothing: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, model: Decoder, batch, teacher: Decoder | None = None, **options):
        return self.loss(model, batch, teacher, **options)

    @property
    def options(self) -> dict[str, Any]:
        """The options' names, in the order of the loss's arguments, and their defaults."""
        bound = self.loss.keywords if isinstance(self.loss, functools.partial) else {}
        arguments = inspect.signature(self.loss).parameters.items()
        return {n: p.default for n, p in arguments if p.kind == p.KEYWORD_ONLY and n not in bound}


_WEIGHTS = dict.fromkeys(("divergence_weight", "next_token_weight"), functools.partial(check_number, minimum=0))
_NO_WEIGHTS = dict.fromkeys(_WEIGHTS, 0)
_DISTILL = {
    "kind": functools.partial(check_choice, choices=KINDS),
    "temperature": functools.partial(check_number, above=0),
    **_WEIGHTS,
}

OBJECTIVES = {
    "next_token": Objective(next_token),
    "distill": Objective(distill, two_streams=True, checks=_DISTILL, nothing=_NO_WEIGHTS),
    "distill_cached": Objective(distill_cached, teacher_cache=True, checks=_WEIGHTS, nothing=_NO_WEIGHTS),
    **{
        f"align_{target}": Objective(
            functools.partial(align, target=target),
            two_streams=True,
            checks={"pre_lm_head": check_boolean},
            nothing={} if ALIGN_TARGETS[target] else {"pre_lm_head": False},
        )
        for target in ALIGN_TARGETS
    },
}


def make_objective(name: str, options: Mapping) -> Callable:
    """The objective with its options.

    Raises:
      ValueError: no objective has that name, or it does not have that option, or not with that value; or nothing would train.
    """
    check_choice("objective", name, OBJECTIVES)
    objective = OBJECTIVES[name]
    known = objective.options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"objective {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    checks = objective.checks
    checked = {n: checks[n](f"options.{n}", value) if n in checks else value for n, value in options.items()}
    if objective.nothing and objective.nothing == {n: {**known, **checked}[n] for n in objective.nothing}:
        given = ", ".join(f"{n} = {value!r}" for n, value in objective.nothing.items())
        raise ValueError(f"objective {name!r} with {given} is 0 everywhere, so nothing would train; set one of them otherwise")
    return functools.partial(objective, **checked)
