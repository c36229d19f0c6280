"""A phase: what trains, with which loss, for how long. A method is a list of phases run by one loop."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_known, check_number
from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.model import REMAT
from hybrid_jax.pattern import format_pattern, parse_pattern
from hybrid_jax.train.hooks import make_hooks
from hybrid_jax.train.objective import Objective
from hybrid_jax.train.objectives import OBJECTIVES, make_objective

SCHEDULES = ("constant", "cosine", "linear", "wsd")
OPTIMIZERS = ("adamw", "muon")

CHOICES = {
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "form": ("fused", "unfused", "as_is"),
    "compute_dtype": ("float32", "bfloat16"),
    "frozen_dtype": ("", "float32", "bfloat16"),
    "remat": tuple(REMAT),
}
SHAPED_BY = {"decay_steps": ("wsd",), "final_fraction": ("cosine", "linear", "wsd")}  # the schedules that read a value
INTEGERS = {  # name -> the least
    **dict.fromkeys(("batch_size", "seq_len", "accumulate", "eval_rows", "bad_steps", "log_every", "checkpoint_every", "keep"), 1),
    **dict.fromkeys(("steps", "tokens", "warmup_steps", "decay_steps", "max_position_embeddings", "keep_every", "eval_every"), 0),
}
NUMBERS = {
    **dict.fromkeys(("epochs", "learning_rate", "weight_decay", "clip", "rope_theta", "answer_weight"), dict(minimum=0)),
    **dict.fromkeys(("warmup_fraction", "final_fraction"), dict(minimum=0, maximum=1)),
    **dict.fromkeys(("beta1", "beta2"), dict(minimum=0, below=1)),
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """One training loop of an experiment: what trains, towards what, on which rows, for how long.

    Args:
      objective: the loss, a key of `OBJECTIVES`.
      options: options of the objective by name, e.g. a temperature.
      pattern: the pattern that the model has from this phase on; empty keeps the model's. Layers that the phase before had
        already converted keep their trained mixers; those that convert now begin as in `initialize_hybrid`, from the model as the
        phase before left it, with the experiment's `mixers`, `fresh_parameters` and `copy_attention`, and the phase's seed.
      form: the form the model is brought into before the phase: `fused` (the teacher's attention beside each student mixer; the
        teacher is the source), `unfused` (students only) or `as_is`. Objectives with two streams need `fused`.
      trainable: regular expressions on parameter names, e.g. `.gka.`; parameters that none of them finds are frozen, and cost
        neither gradients nor optimizer state. `all` is everything. Parameters that only the teacher reads never train.
      steps, tokens, epochs: the length, by exactly one of: optimizer steps; tokens, or passes over the rows of the phase's one
        source, both rounded to steps, one at least.
      batch_size: rows per step, of all devices together.
      seq_len: tokens per row.
      accumulate: microbatches per step, computed one after the other. The gradient is that of the complete batch; raise it when
        a batch does not fit.
      learning_rate: the peak.
      schedule: `constant`, `cosine`, `linear`, or `wsd` (warm-up, stable, linear decay over the last `decay_steps`). The schedule
        counts every step of the phase, skipped ones too, so the phase always ends at its end; the moments count accepted steps.
      final_fraction: learning rate at the end, as a fraction of the peak.
      warmup_steps, warmup_fraction: length of the linear warm-up, in steps or as a fraction of all steps.
      decay_steps: length of the decay of `wsd`, in steps.
      optimizer: `adamw`; or `muon` (arXiv 2502.16982; momentum 0.95, Nesterov) for the matrices of projections and experts, with
        AdamW for everything else.
      beta1, beta2: of AdamW, in [0, 1).
      weight_decay: decoupled, multiplied by the learning rate, with either optimizer. A parameter's marks say whether it decays
        (`layers.parameter`): norms, biases, A_log, dt_bias and D do not.
      clip: the largest global gradient norm; a larger gradient is scaled down to it. 0 turns clipping off.
      spike: skip a step whose loss or gradient norm exceeds `spike` times its running mean (above 1; 0: off). Use it for long
        runs on noisy data. Steps that are not finite are always skipped.
      bad_steps: end the phase with an error after this many skipped steps in a row.
      rope_theta, max_position_embeddings: new values for the model from this phase on, for longer contexts; 0 keeps the model's. A
        `window_rope` of the model, that of layers with a window of their own, keeps its base.
        The teacher keeps its own.
      compute_dtype: of activations and matrix products: `float32` or `bfloat16` (on accelerators).
      frozen_dtype: of frozen matrices; `bfloat16` halves their memory, and rounds them in the saved model too. The reference's
        copies of what trains have it only where the model computes with the same numbers. Empty keeps the model's.
      remat: what a layer keeps for its gradient. `none` keeps everything and is fastest; `attention` keeps attention's outputs
        and recomputes the rest; `full` keeps only the layer's input, for long rows. `hybrid-jax plan` says what fits.
      mix: source name -> share of the rows (see `hybrid_jax.data`); empty takes the experiment's `data.mix`.
      answer_weight: weight of the answer tokens of a synthetic task in the loss; a token of text has weight 1.
      teacher: a model directory, whose model teaches in place of the source: of any family and size, with the source's tokenizer.
        For objectives that compare next-token distributions alone, `distill` and `distill_cached`; the model is then not fused. It
        is frozen, takes `frozen_dtype`, and has its own RoPE. Empty: the source teaches.
      teacher_cache: for `distill_cached`, the directory that `cache-teacher` made.
      mesh: axis -> size (see `parallel.mesh`); empty takes the experiment's.
      eval_every: steps between two evaluations (see `train.evaluation`), which do not change the training; 0: none. The last
        step is evaluated too.
      eval_rows: rows per source that are evaluated; more of them make differences between steps less noisy.
      keep_best: keep the checkpoint with the lowest `eval/loss` beside the newest ones, also when the phase has ended, for
        `export --phase P --step N`; `eval/best_step` in the metrics is its step. Needs `eval_every`.
      hooks: name -> `hook` ("MODULE:CLASS"), `every` and the class's options: what else is called every so many steps and logs
        values (see `train.hooks`).
      log_every: steps between two lines of metrics, which hold means over these steps (see `train.interval`).
      checkpoint_every: steps between two checkpoints.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints of steps that this number divides are never removed; 0: none.
    """

    objective: str
    steps: int = 0
    tokens: int = 0
    epochs: float = 0.0
    options: Mapping = dataclasses.field(default_factory=dict)
    pattern: str = ""
    form: str = "as_is"
    trainable: tuple[str, ...] = ("all",)
    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float = 1e-4
    accumulate: int = 1
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    decay_steps: int = 0
    final_fraction: float = 0.0
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    spike: float = 0.0
    bad_steps: int = 10
    rope_theta: float = 0.0
    max_position_embeddings: int = 0
    compute_dtype: str = "float32"
    frozen_dtype: str = ""
    remat: str = "none"
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)
    answer_weight: float = 1.0
    teacher: str = ""
    teacher_cache: str = ""
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    eval_every: int = 0
    eval_rows: int = 64
    keep_best: bool = False
    hooks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self):
        try:
            make_objective(self.objective, self.options)
        except ValueError as e:
            raise ValueError(f"phase.{e}") from None
        self._check_values()
        if self.batch_size % self.accumulate:
            raise ValueError(f"phase.accumulate {self.accumulate} does not divide phase.batch_size {self.batch_size}")
        objective = OBJECTIVES[self.objective]
        if self.teacher:
            self._check_teacher(objective)
        elif objective.two_streams and self.form != "fused":
            raise ValueError(f"phase.objective {self.objective!r} compares two streams; set phase.form = 'fused'")
        if objective.reference and self.form == "fused":
            raise ValueError(f"phase.objective {self.objective!r} has no teacher's stream; set phase.form = 'unfused'")
        if objective.teacher_cache != bool(self.teacher_cache):
            wants = "needs" if objective.teacher_cache else "does not read"
            raise ValueError(f"phase.objective {self.objective!r} {wants} a phase.teacher_cache")
        given = {name: getattr(self, name) for name in ("steps", "tokens", "epochs") if getattr(self, name)}
        if len(given) != 1:
            raise ValueError(f"phase needs one of steps, tokens and epochs, got {given or 'none'}")
        if self.epochs and len(self.mix) != 1:
            raise ValueError(f"phase.epochs needs a phase.mix of one source, got {dict(self.mix)}")
        for name, schedules in SHAPED_BY.items():
            if getattr(self, name) and self.schedule not in schedules:
                raise ValueError(
                    f"phase.{name} is {getattr(self, name)}, but the schedule {self.schedule!r} does not read it; leave it at 0, "
                    f"or take one of {', '.join(schedules)}"
                )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("phase has both warmup_steps and warmup_fraction; give one")
        if not self.epochs:  # of epochs `with_rows` says how many steps they are
            self._count_steps()

    def _check_values(self):
        """Every value on its own.

        Raises:
          ValueError: one that nobody can mean; names it.
        """
        for name, choices in CHOICES.items():
            check_choice(f"phase.{name}", getattr(self, name), choices)
        for name, least in INTEGERS.items():
            check_integer(f"phase.{name}", getattr(self, name), minimum=least)
        for name, bounds in NUMBERS.items():
            check_number(f"phase.{name}", getattr(self, name), **bounds)
        if check_boolean("phase.keep_best", self.keep_best) and not self.eval_every:
            raise ValueError("phase.keep_best needs a phase.eval_every: the best checkpoint is that of the lowest held-out loss")
        if check_number("phase.spike", self.spike, minimum=0) and self.spike <= 1:
            raise ValueError(f"phase.spike must be above 1, or 0 for never, got {self.spike}: the mean itself would be skipped")
        for name, share in dict(self.mix).items():
            check_number(f"phase.mix.{name}", share, minimum=0)
        if self.mix and not any(dict(self.mix).values()):
            raise ValueError(f"phase.mix needs at least one positive share, got {dict(self.mix)}; leave it out for data.mix")
        make_hooks(self.hooks)
        self._check_pattern()
        if not isinstance(self.teacher, str):
            raise ValueError(f"phase.teacher must be the path of a model directory, got {self.teacher!r}")
        if not isinstance(self.trainable, (tuple, list)):
            raise ValueError(f"phase.trainable must be a list of regular expressions, got {self.trainable!r}")
        for pattern in self.trainable:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                raise ValueError(f"phase.trainable has {pattern!r}, which is no regular expression: {e}") from None
        object.__setattr__(self, "trainable", tuple(self.trainable))

    def _check_pattern(self):
        """What is known of `pattern` without the model.

        Raises:
          ValueError: it is none, or has teachers.
        """
        if not isinstance(self.pattern, str):
            raise ValueError(f"phase.pattern must be a string of one symbol per layer, e.g. '*-GKA', got {self.pattern!r}")
        if not self.pattern:
            return
        layers = parse_pattern(self.pattern)
        if fused := [layer.symbol for layer in layers if layer.fused]:
            raise ValueError(
                f"phase.pattern has {fused[0]!r}, but phase.form says whether mixers stand beside their teachers; write "
                f"{format_pattern([layer.unfused() for layer in layers])!r}"
            )

    def _check_teacher(self, objective: Objective):
        """Checks that the phase's objective and form are for another teacher than the source."""
        if not objective.any_teacher:
            known = ", ".join(name for name, other in OBJECTIVES.items() if other.any_teacher)
            raise ValueError(
                f"phase.objective {self.objective!r} does not compare next-token distributions alone, so that no other model than "
                f"the source can teach it; leave phase.teacher out, or take one of {known}"
            )
        if self.form == "fused":
            raise ValueError(
                "phase.form is 'fused', which has the source's own layers as teachers; with a phase.teacher set 'unfused' or "
                "'as_is'"
            )

    def _count_steps(self):
        """`steps` and `warmup_steps` in place of what they follow from, and the checks that need them."""
        if self.tokens:
            object.__setattr__(self, "steps", max(1, round(self.tokens / self.tokens_per_step)))
            object.__setattr__(self, "tokens", 0)
        if self.warmup_fraction:
            object.__setattr__(self, "warmup_steps", math.ceil(self.warmup_fraction * self.steps))
            object.__setattr__(self, "warmup_fraction", 0.0)
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"phase.warmup_steps must be in 0 ... steps ({self.steps}), got {self.warmup_steps}")
        if self.schedule == "wsd" and not 0 < self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(f"phase.decay_steps of 'wsd' must be in 1 ... steps - warmup_steps, got {self.decay_steps}")

    @classmethod
    def from_config(cls, name: str, values: Mapping) -> Phase:
        """Reads a phase from a config.

        Raises:
          ValueError: an unknown or missing key, or a bad value; the message names the phase.
        """
        check_known(f"phase {name!r}", values, {f.name for f in dataclasses.fields(cls)})
        try:
            phase = cls(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"phase {name!r}: {e}") from None
        if not phase.trainable:
            raise ValueError(f"phase {name!r}: phase.trainable is empty, so nothing would train; 'all' is everything")
        return phase

    def in_steps(self, corpus: Corpus, mix: Mapping[str, float], seed: int) -> Phase:
        """The phase in steps, where it is given in epochs of its one source."""
        if not self.epochs:
            return self
        (source,) = (name for name, share in mix.items() if share)
        return self.with_rows(len(corpus.rows(source, self.seq_len, seed)))

    def with_rows(self, rows: int) -> Phase:
        """The phase in steps, where it is given in epochs, of a source of so many rows."""
        if not self.epochs:
            return self
        return dataclasses.replace(self, steps=max(1, round(self.epochs * rows / self.batch_size)), epochs=0.0)

    def described_rows(self, mix: Mapping[str, float], seed: int) -> dict:
        """What says which rows the phase sees, as `training_batches` and `TeacherCache` take it."""
        return dict(mix=mix, batch_size=self.batch_size, length=self.seq_len, seed=seed, answer_weight=self.answer_weight)

    def keeps_teachers(self, before: ModelConfig) -> bool:
        """Returns whether the phase has a fused model, where the phase before left one of this config."""
        return self.form == "fused" or (self.form == "as_is" and before.is_fused)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a part of a step."""
        return self.batch_size // self.accumulate
