"""Objectives: small functions (model, batch) -> (loss, metrics).

A batch is what `hybrid_jax.data.layout.training_batch` makes: `input_ids`, `segment_ids`, `positions`, `targets`
and `weights`, [B,T] each, in the mesh's order of tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hybrid_jax.model import Decoder, LayerOutputs
from hybrid_jax.parallel.cross_entropy import cross_entropy


def next_token(model: Decoder, batch):
    """Weighted mean next-token cross-entropy."""
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    losses, weights = cross_entropy(hidden, model.head_kernel, batch["targets"]), batch["weights"]
    loss = jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)
    return loss, {"loss": loss}


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


def align(model: Decoder, batch, *, target: str, pre_lm_head: bool = True):
    """Stage 1 of Priming (arXiv 2605.08301): the student stream imitates the teacher's.

    loss = sum over layers of target(layer) / number of layers + MSE(final normed states) if `pre_lm_head`.
    Metrics hold every layer's mixer error, `mixer_mse/N`, whatever the target.
    """

    def compare(teacher, student):
        return ALIGN_TARGETS[target](teacher, student), _compare("mixer")(teacher, student)

    streams = model.two_streams(batch["input_ids"], batch["segment_ids"], batch["positions"], compare)
    loss = sum(of_layer for of_layer, _ in streams.layers) / len(streams.layers)
    final = _mse(streams.student, streams.teacher)
    if pre_lm_head:
        loss = loss + final
    metrics = {"loss": loss, "pre_lm_head_mse": final}
    for i, (_, mixer) in enumerate(streams.layers):
        if not model.config.layers[i].shared:
            metrics[f"mixer_mse/{i:02d}"] = mixer
    return loss, metrics


OBJECTIVES = {
    "next_token": next_token,
    **{f"align_{target}": functools.partial(align, target=target) for target in ALIGN_TARGETS},
}
