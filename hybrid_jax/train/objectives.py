"""Objectives: small functions (model, batch, teacher, **options) -> (loss, metrics).

A batch is what `hybrid_jax.data.layout.training_batch` makes: `input_ids`, `segment_ids`, `positions`, `targets`
and `weights`, [B,T] each, in the mesh's order of tokens. Of the metrics `weight` says what the loss is a mean over, so that
parts of a batch can be put together again, and `PER_TOKEN`, where there is one, holds every token's loss and weight [B,T].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

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
      teacher: a fused model whose teacher stream it is; None: the model's own, whose parameters do not train.
      kind: `forward` KL(teacher | student) or `reverse`.
    """
    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])
    if teacher is None:
        streams = model.two_streams(*at, compare=lambda t, s: ())
        wanted, hidden, head = streams.teacher, streams.student, model.head_kernel
    else:
        wanted, head = teacher.hidden_states(*at, stream="teacher")[0], teacher.head_kernel
        hidden = model.hidden_states(*at)[0]
    found = divergence(hidden, model.head_kernel, wanted, head, kind=kind, temperature=temperature)
    return _mixed(model, batch, hidden, found, divergence_weight * temperature**2, next_token_weight)


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


def _mse(a, b):
    """Mean over every element, in float32; `b` is the teacher and takes no gradient."""
    return jnp.mean(jnp.square(a.astype(jnp.float32) - jax.lax.stop_gradient(b).astype(jnp.float32)))


def _compare(field):
    return lambda teacher, student: _mse(getattr(student, field), getattr(teacher, field))


def _residuals(teacher: LayerOutputs, student: LayerOutputs):
    return _compare("mixer")(teacher, student) + _compare("mlp")(teacher, student)


# hybrid-model-factory's `hybrid_lw_distill_target`: (teacher, student) outputs of a layer -> its loss.
ALIGN_TARGETS = {
    "decoder": _compare("hidden"),
    "mixer": _compare("mixer"),
    "residuals": _residuals,
    "all": lambda t, s: _residuals(t, s) + _compare("hidden")(t, s),
    "none": lambda t, s: jnp.zeros(()),
}


def align(model: Decoder, batch, teacher=None, *, target: str, pre_lm_head: bool = True):
    """Stage 1 of Priming (arXiv 2605.08301): the student stream imitates the teacher's.

    loss = sum over layers of target(layer) / number of layers + MSE(final normed states) if `pre_lm_head`.
    Metrics hold every layer's mixer error, `mixer_mse/N`, whatever the target.
    """

    del teacher

    def compare(teacher, student):
        return ALIGN_TARGETS[target](teacher, student), _compare("mixer")(teacher, student)

    streams = model.two_streams(batch["input_ids"], batch["segment_ids"], batch["positions"], compare)
    loss = sum(of_layer for of_layer, _ in streams.layers) / len(streams.layers)
    final = _mse(streams.student, streams.teacher)
    if pre_lm_head:
        loss = loss + final
    metrics = {"loss": loss, "weight": jnp.float32(batch["input_ids"].size), "pre_lm_head_mse": final}
    for i, (_, mixer) in enumerate(streams.layers):
        if not model.config.layers[i].shared:
            metrics[f"mixer_mse/{i:02d}"] = mixer
    return loss, metrics


OBJECTIVES = {
    "next_token": next_token,
    "distill": distill,
    "distill_cached": distill_cached,
    **{f"align_{target}": functools.partial(align, target=target) for target in ALIGN_TARGETS},
}

FUSED = {"distill", *(name for name in OBJECTIVES if name.startswith("align_"))}  # those that need a teacher beside the student


def make_objective(name: str, options: Mapping) -> Callable:
    """The objective with its options.

    Raises:
      ValueError: no objective has that name, or it has not that option.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective is {name!r}; expected one of {', '.join(OBJECTIVES)}")
    known = [n for n, p in inspect.signature(OBJECTIVES[name]).parameters.items() if p.kind == p.KEYWORD_ONLY and n != "target"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"objective {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if options.get("kind", "forward") not in KINDS:
        raise ValueError(f"objective option kind is {options['kind']!r}; expected one of {', '.join(KINDS)}")
    return functools.partial(OBJECTIVES[name], **options)
