"""A phase: what trains, with which loss, for how long. A method is a list of phases run by one loop."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_known, check_number
from hybrid_jax.data import Corpus
from hybrid_jax.model import REMAT
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
    """One stage of training.

    Args:
      objective, options: key of `OBJECTIVES`, and what it takes by name.
      form: what the model is turned into before the phase: `fused` (teacher, which is the source, beside student), `unfused`,
        or `as_is`.
      trainable: regular expressions on parameter names; what no one finds is frozen. `all` is everything. What the teacher alone
        reads never trains.
      steps: optimizer steps; or `tokens`, for as many steps as those need; or `epochs` over the rows of the phase's one source.
      batch_size, seq_len: rows a step and tokens a row.
      accumulate: parts in which a step's rows are computed, one after the other; their gradients are those of the whole.
      learning_rate, schedule, final_fraction: the peak, its shape (constant; cosine; linear; wsd: warmup, stable, and
        a linear decay over the last `decay_steps`), and the fraction of the peak at the end. The schedule follows the steps of
        the phase, each of which takes a batch of the data: a skipped step uses up its place, so the phase always ends at the
        end of its schedule. Moments and their bias corrections follow the steps that counted.
      warmup_steps: linear, from nothing; or `warmup_fraction` of the steps.
      optimizer: adamw; or muon, for projections and experts, each a matrix of its own (momentum 0.95, Nesterov), and AdamW
        for all others: embeddings, head, router, convolutions, norms, biases.
      beta1, beta2: AdamW's, in [0, 1).
      weight_decay: times the learning rate, by either optimizer; never of norms, biases, A_log, dt_bias and D.
      clip: the largest global norm of the gradient; 0: no clipping.
      spike: a step whose loss or gradient norm is so many times its running mean is skipped, above 1; 0: never. One of which
        either is not finite always is.
      bad_steps: skipped steps in a row that end the phase.
      rope_theta, max_position_embeddings: of the model from this phase on, not of its teacher; 0 keeps them.
      compute_dtype: of activations.
      frozen_dtype: of the matrices that do not train, rounded (and so saved) if lower than the model's; empty keeps it.
      remat: what a layer keeps for its gradient: none (all of it), attention, full (its input alone).
      mix: source name -> share of the rows (see `hybrid_jax.data`); empty takes the experiment's `data.mix`.
      answer_weight: weight of a synthetic task's answer, against 1 for a token of text.
      teacher_cache: for `distill_cached`, the directory made by `cache-teacher`.
      mesh: axis -> size (see `parallel.mesh`), in place of the experiment's.
      eval_every: steps between two evaluations (see `train.evaluation`), which do not change the training; 0: none. The last
        step is evaluated too. An evaluation costs about a third of a step per `batch_size` rows.
      eval_rows: rows of each source that are evaluated; more of them make differences between steps less noisy.
      keep_best: keeps the checkpoint with the lowest `eval/loss` beside the newest ones, also when the phase has ended, for
        `export --phase P --step N`; `eval/best_step` in the metrics is its step. Needs `eval_every`.
      log_every: steps, of which the means are logged (see `train.interval`); step 1 is logged on its own.
      checkpoint_every: steps.
      keep, keep_every: the newest checkpoints that stay, and the steps whose checkpoints outlive the phase (0: none do).
    """

    objective: str
    steps: int = 0
    tokens: int = 0
    epochs: float = 0.0
    options: Mapping = dataclasses.field(default_factory=dict)
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
    teacher_cache: str = ""
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    eval_every: int = 0
    eval_rows: int = 64
    keep_best: bool = False
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
        if objective.two_streams and self.form != "fused":
            raise ValueError(f"phase.objective {self.objective!r} compares two streams; set phase.form = 'fused'")
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
        if not isinstance(self.trainable, (tuple, list)):
            raise ValueError(f"phase.trainable must be a list of regular expressions, got {self.trainable!r}")
        for pattern in self.trainable:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                raise ValueError(f"phase.trainable has {pattern!r}, which is no regular expression: {e}") from None
        object.__setattr__(self, "trainable", tuple(self.trainable))

    def _count_steps(self):
        """`steps` and `warmup_steps` in place of what they follow from, and the checks that need them."""
        if self.tokens:
            object.__setattr__(self, "steps", max(1, round(self.tokens / self.tokens_per_step)))
            object.__setattr__(self, "tokens", 0)
        if self.warmup_fraction:
            object.__setattr__(self, "warmup_steps", math.ceil(self.warmup_fraction * self.steps))
            object.__setattr__(self, "warmup_fraction", 0.0)
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"phase.warmup_steps must lie in 0 ... steps ({self.steps}), got {self.warmup_steps}")
        if self.schedule == "wsd" and not 0 < self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(f"phase.decay_steps of 'wsd' must lie in 1 ... steps - warmup_steps, got {self.decay_steps}")

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

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a part of a step."""
        return self.batch_size // self.accumulate
