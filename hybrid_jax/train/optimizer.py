"""The optimizer of a phase, from optax, over a dict of named parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
import optax
from optax import contrib

from hybrid_jax.train.phase import Phase

_NOT_DECAYED = re.compile(r"(norm\w*\.weight|\.bias|\.A_log|\.dt_bias|\.D)$")
_MATRIX = re.compile(r"(\.kernel|\.experts\.\w+)$")  # in the last two axes; layers and experts may be stacked before them
_NOT_MUON = re.compile(r"(embed_tokens|lm_head|conv1d|\.mlp\.gate\.)")
MUON = contrib.MuonDimensionNumbers(-2, -1)
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


def decayed(parameters: Mapping[str, jax.Array]) -> dict[str, bool]:
    """Which parameters take weight decay: all but norms, biases, A_log, dt_bias and D."""
    return {name: not _NOT_DECAYED.search("." + name) for name in parameters}


def muon_matrices(parameters: Mapping[str, jax.Array]) -> dict[str, bool]:
    """Which parameters Muon updates: every projection and every expert's; not embeddings, head, router and convolutions."""
    return {name: bool(_MATRIX.search(name)) and not _NOT_MUON.search(name) for name in parameters}


def make_optimizer(phase: Phase) -> optax.GradientTransformation:
    """Gradients -> directions, of which a step subtracts the learning rate times: clipped, by AdamW or Muon, with decay.

    The directions do not depend on the learning rate, so that the schedule can follow the steps of the phase and the moments
    only those that counted. Under Muon, what is no matrix of its gets exactly AdamW's directions.
    """
    adam = optax.scale_by_adam(phase.beta1, phase.beta2)
    if phase.optimizer == "muon":
        adam = optax.partition(
            {
                "muon": optax.chain(contrib.scale_by_muon(weight_dimension_numbers=_all_matrices), optax.stateless(_of_one_rms)),
                "adamw": adam,
            },
            lambda parameters: {n: "muon" if muon else "adamw" for n, muon in muon_matrices(parameters).items()},
        )
    clip = optax.clip_by_global_norm(phase.clip) if phase.clip else optax.identity()
    return optax.chain(clip, adam, optax.add_decayed_weights(phase.weight_decay, decayed))


def _all_matrices(parameters):
    """For every array that is there; what the partition left out stays out."""
    return jax.tree.map(lambda _: MUON, parameters)


def _of_one_rms(updates, _):
    """Orthogonal matrices, scaled so that the root of their mean square is `MUON_RMS` whatever their shape."""
    return jax.tree.map(lambda x: MUON_RMS * math.sqrt(max(x.shape[-2:])) * x, updates)
