"""A phase: what trains, with which loss, for how long. A method is a list of phases run by one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hybrid_jax.model import REMAT
from hybrid_jax.train.objectives import OBJECTIVES

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stage of training.

    Args:
      objective: key of `OBJECTIVES`.
      form: what the model is turned into before the phase: `fused` (teacher beside student), `unfused`,
        or `as_is`.
      trainable: regular expressions on parameter names; what no one finds is frozen. `all` is everything.
      steps: optimizer steps.
      batch_size, seq_len: rows a step and tokens a row.
      learning_rate, schedule, warmup_steps, final_fraction: the peak, its shape (constant, cosine,
        linear), linear warmup, and the fraction of the peak at the end.
      optimizer: adamw, or muon (matrices by Muon, the rest by AdamW).
      weight_decay: on matrices alone (never norms, biases, A_log, dt_bias, D).
      clip: global gradient norm.
      compute_dtype: of activations.
      frozen_dtype: of the matrices that do not train, rounded (and so saved) if lower than the model's; empty keeps it.
      remat: what a layer keeps for its gradient: none (all of it), attention, full (its input alone).
      mix: source name -> share of the rows (see `hybrid_jax.data`); empty takes the experiment's `data.mix`.
      answer_weight: weight of a synthetic task's answer, against 1 for a token of text.
      log_every, checkpoint_every: steps.
    """

    objective: str
    steps: int
    form: str = "as_is"
    trainable: tuple[str, ...] = ("all",)
    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    compute_dtype: str = "float32"
    frozen_dtype: str = ""
    remat: str = "none"
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)
    answer_weight: float = 1.0
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self):
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("form", ("fused", "unfused", "as_is")),
            ("compute_dtype", ("float32", "bfloat16")),
            ("frozen_dtype", ("", "float32", "bfloat16")),
            ("remat", tuple(REMAT)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"phase.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("steps", "batch_size", "seq_len", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"phase.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"phase.warmup_steps must lie in 0 ... steps ({self.steps}), got {self.warmup_steps}")
        if self.objective.startswith("align_") and self.form != "fused":
            raise ValueError(f"phase.objective {self.objective!r} compares two streams; set phase.form = 'fused'")

    @classmethod
    def from_config(cls, name: str, values: Mapping) -> Phase:
        """Reads a phase from a config.

        Raises:
          ValueError: an unknown or missing key, or a bad value; the message names the phase.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"phase {name!r} has the unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        try:
            return cls(**{k: tuple(v) if k == "trainable" else v for k, v in values.items()})
        except (TypeError, ValueError) as e:
            raise ValueError(f"phase {name!r}: {e}") from None

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len
