"""The optimizer of a phase, from optax, over a dict of named parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import jax
import optax
from optax import contrib

from hybrid_jax.train.phase import Phase

_NOT_DECAYED = re.compile(r"(norm\w*\.weight|\.bias|\.A_log|\.dt_bias|\.D)$")
_NOT_MUON = re.compile(r"(embed_tokens|lm_head|conv1d|\.mlp\.gate\.)")


def learning_rate_schedule(phase: Phase) -> optax.Schedule:
    """Linear warmup to the peak, then the phase's shape down to `final_fraction` of it."""
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


def make_optimizer(phase: Phase, stacked: Collection[str] = ()) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon.

    Args:
      stacked: names of parameters with a leading axis of layers, each of which is a matrix to Muon.
    """
    schedule = learning_rate_schedule(phase)
    if phase.optimizer == "adamw":
        update = optax.adamw(schedule, phase.beta1, phase.beta2, weight_decay=phase.weight_decay, mask=decayed)
    else:

        def matrices(parameters):
            def one(path, p):
                lead = int(path[0].key in stacked)
                matrix = p.ndim - lead == 2 and not _NOT_MUON.search(path[0].key)
                return contrib.MuonDimensionNumbers(lead, lead + 1) if matrix else None

            return jax.tree_util.tree_map_with_path(one, parameters)

        update = contrib.muon(
            schedule,
            weight_decay=phase.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=phase.beta1,
            adam_b2=phase.beta2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(phase.clip), update)
