"""The optimizer of a phase, from optax, over a dict of named parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from hybrid_jax.layers.parameter import Marks
from hybrid_jax.train.phase import Phase

MUON = contrib.MuonDimensionNumbers(-2, -1)  # the last two axes; layers and experts may be stacked before them
MUON_RMS = 0.2  # of an update, as AdamW's (arXiv 2502.16982)


def learning_rate_schedule(phase: Phase) -> optax.Schedule:
    """Steps done -> the learning rate of the next one: linear warmup to the peak, then the phase's shape.

    With s steps done, w of warmup, N in all: peak * (s + 1) / w while s < w; from there on the shape, which is at the peak
    at s = w and would be at `final_fraction` of it at s = N.
    """
    peak, rest = phase.learning_rate, max(phase.steps - phase.warmup_steps, 1)
    end = peak * phase.final_fraction
    shape = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=phase.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "wsd": lambda: optax.linear_schedule(peak, end, phase.decay_steps, rest - phase.decay_steps),
    }[phase.schedule]()
    if not phase.warmup_steps:
        return shape
    warmup = optax.linear_schedule(peak / phase.warmup_steps, peak, phase.warmup_steps - 1)
    return optax.join_schedules([warmup, shape], [phase.warmup_steps])


def make_optimizer(phase: Phase, marks: Mapping[str, Marks]) -> optax.GradientTransformation:
    """Gradients -> directions, of which a step subtracts the learning rate times: clipped, by AdamW or Muon, with decay.

    The directions do not depend on the learning rate, so that the schedule can follow the steps of the phase and the moments
    only those that counted. Under Muon, what is no matrix of its gets exactly AdamW's directions.

    Args:
      phase: its optimizer, betas, clipping and weight decay.
      marks: of every parameter that may train: `muon` and `decay` say which are updated by Muon and which decay.
    """
    adam = optax.scale_by_adam(phase.beta1, phase.beta2)
    if phase.optimizer == "muon":
        adam = optax.partition(
            {
                "muon": optax.chain(contrib.scale_by_muon(weight_dimension_numbers=_all_matrices), optax.stateless(_of_one_rms)),
                "adamw": adam,
            },
            lambda parameters: {name: "muon" if marks[name].muon else "adamw" for name in parameters},
        )
    clip = optax.clip_by_global_norm(phase.clip) if phase.clip else optax.identity()

    def decays(parameters: Any) -> Any:
        return {name: marks[name].decay for name in parameters}

    decay = optax.add_decayed_weights(phase.weight_decay, decays)
    return optax.chain(clip, adam, decay)


def _all_matrices(parameters):
    """For every array that is there; what the partition left out stays out."""
    return jax.tree.map(lambda _: MUON, parameters)


def _of_one_rms(updates, _):
    """Orthogonal matrices, scaled so that the root of their mean square is `MUON_RMS` whatever their shape."""
    return jax.tree.map(lambda x: MUON_RMS * math.sqrt(max(x.shape[-2:])) * x, updates)
