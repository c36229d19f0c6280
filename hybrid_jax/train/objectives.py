"""The objectives: a function each, and one row in `OBJECTIVES`. The contract is in `train.objective`.

To add one, write a function like those below and add its row to the table; an option is a keyword-only argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_number
from hybrid_jax.data.layout import TEACHER
from hybrid_jax.data.packing import PAIRS_IN_ROW
from hybrid_jax.layers.head_hybrid import HeadHybrid
from hybrid_jax.layers.mixing import ROWS, over_blocks
from hybrid_jax.model import Decoder, LayerOutputs
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.divergence import KINDS, divergence, top_k_divergence
from hybrid_jax.train.objective import INPUTS, LABELS, Batch, Mean, Objective, Outcome, mean_over_tokens
from kernels_pallas.numerics import safe_sqrt


def next_token(model: Decoder, batch: Batch, teacher: Decoder | None = None) -> Outcome:
    """Weighted mean next-token cross-entropy: of text, or of what an assistant says (the data's weights make it SFT)."""
    del teacher
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    losses = cross_entropy(hidden, model.head, batch["targets"])
    return mean_over_tokens(losses, batch["weights"])


def distill(
    model: Decoder,
    batch: Batch,
    teacher: Decoder | None = None,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    next_token_weight: float = 0.0,
) -> Outcome:
    """Compares the student's next-token distribution with the teacher's (arXiv 2408.15237, 2502.20339).

    loss = divergence_weight * temperature^2 * KL + next_token_weight * cross-entropy, weighted means over tokens.

    Args:
      model: a fused model, or with another model as `teacher` one that is not fused.
      teacher: the model whose teacher stream is the target; None: the model's own, whose parameters are frozen.
      kind: `forward`, KL(teacher | student), or `reverse`, KL(student | teacher).
      temperature: divides both models' logits; above 1 the tail of the teacher's distribution counts more.
      divergence_weight, next_token_weight: of the two terms; at least one is positive.
    """
    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])
    if teacher is None or model.config.is_fused:
        streams = model.two_streams(*at, compare=lambda t, s: (), teacher=teacher)
        hidden, taught = streams.student, streams.teacher
    else:
        hidden, taught = (one.hidden_states(*at)[0] for one in (model, teacher))
    found = divergence(hidden, model.head, taught, (teacher or model).head, kind=kind, temperature=temperature)
    return _mixed(model, batch, hidden, found, divergence_weight * temperature**2, next_token_weight)


def distill_cached(
    model: Decoder,
    batch: Batch,
    teacher: Decoder | None = None,
    *,
    divergence_weight: float = 1.0,
    next_token_weight: float = 0.0,
) -> Outcome:
    """Computes `distill`, forward, for a teacher whose top-k tokens are in the batch: no teacher runs beside the student.

    All tokens outside the teacher's top-k count as one event.
    """
    del teacher
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    found = top_k_divergence(hidden, model.head, batch["teacher_ids"], batch["teacher_log_probabilities"])
    return _mixed(model, batch, hidden, found, divergence_weight, next_token_weight)


def _mixed(
    model: Decoder, batch: Batch, hidden: jax.Array, found: jax.Array, divergence_weight: float, next_token_weight: float
) -> Outcome:
    """Returns the outcome of a divergence `found` [B, T], with a share of the next-token cross-entropy."""
    weights, losses = batch["weights"], divergence_weight * found
    metrics = {"divergence": Mean.of(found, weights)}
    if next_token_weight:
        entropies = cross_entropy(hidden, model.head, batch["targets"])
        metrics["next_token"], losses = Mean.of(entropies, weights), losses + next_token_weight * entropies
    return mean_over_tokens(losses, weights, metrics)


def _error(student: jax.Array, teacher: jax.Array, real: jax.Array, kind: str = "mse") -> jax.Array:
    """Returns every real token's error, a key of `ERRORS`, [B, T] float32, 0 at padding.

    Args:
      student, teacher: [B, T, hidden]; the teacher takes no gradient.
      real: [B, T] bool, False at padding.
    """
    square = jnp.square(student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32))
    return ERRORS[kind](jnp.where(real[..., None], square, 0))


# The squares of a token's differences [B, T, hidden] -> its error [B, T]: mean square error, or Euclidean norm.
ERRORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mse": lambda square: jnp.mean(square, axis=-1),
    "norm": lambda square: safe_sqrt(jnp.sum(square, axis=-1)),
}


# hybrid-model-factory's `hybrid_lw_distill_target`: the parts of `LayerOutputs` whose errors are added to a layer's loss.
ALIGN_TARGETS = {
    "decoder": ("hidden",),
    "mixer": ("mixer",),
    "residuals": ("mixer", "mlp"),
    "all": ("mixer", "mlp", "hidden"),
    "none": (),
}
INPUTS_OF_LAYERS = ("student", "teacher")


def align(
    model: Decoder,
    batch: Batch,
    teacher: Decoder | None = None,
    *,
    target: str,
    pre_lm_head: bool = True,
    inputs: str = "student",
    error: str = "mse",
) -> Outcome:
    """Makes the student stream imitate the teacher's: stage 1 of Priming (arXiv 2605.08301).

    loss = sum over layers of target(layer) / number of layers + error(final normed states) if `pre_lm_head`. Every mean is over
    real tokens: padding (segment 0) counts for nothing.
    Metrics hold every layer's mixer error, `mixer_mse/N`, whatever the target.

    With `inputs = "teacher"` every layer of the student reads the teacher's states, as in the second stage of MOHAWK (arXiv
    2408.10189): layers learn independently of each other, and no gradient passes through the layers above, which makes a step
    cheaper. What errors of several layers add up to is not trained then; a later phase has to do it.

    Args:
      model: a fused model.
      teacher: the model whose teacher stream is the target; None: the model's own, whose parameters are frozen.
      target: a key of `ALIGN_TARGETS`.
      pre_lm_head: whether the final normed states are compared too. With `inputs = "teacher"` there are none to compare.
      inputs: what a layer of the student reads: the `student`'s own states or the `teacher`'s.
      error: of a token: `mse`, over the channels (Priming), or `norm`, the Euclidean norm of the difference (MOHAWK). The metrics
        are mean square errors in both cases.
    """
    real = batch["segment_ids"] > 0
    weights = real.astype(jnp.float32)

    def compare(taught: LayerOutputs, student: LayerOutputs):
        parts = ALIGN_TARGETS[target]
        errors = {part: _error(getattr(student, part), getattr(taught, part), real, error) for part in parts}
        of_layer = sum(errors.values(), jnp.zeros(real.shape))
        return of_layer, Mean.of(_error(student.mixer, taught.mixer, real), weights)

    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])
    streams = model.two_streams(*at, compare, teacher, layerwise=inputs == "teacher")
    losses = sum((of_layer for of_layer, _ in streams.layers), jnp.zeros(real.shape)) / len(streams.layers)
    metrics = {}
    if inputs == "student":
        metrics["pre_lm_head_mse"] = Mean.of(_error(streams.student, streams.teacher, real), weights)
        losses = losses + _error(streams.student, streams.teacher, real, error) if pre_lm_head else losses
    for i, (_, mixer) in enumerate(streams.layers):
        if not model.config.layers[i].shared:
            metrics[f"mixer_mse/{i:02d}"] = mixer
    return mean_over_tokens(losses, weights, metrics)


def align_matrices(model: Decoder, batch: Batch, teacher: Decoder | None = None, *, rows: int = ROWS) -> Outcome:
    """Makes the mixing matrices of the student's heads those of attention: the first stage of MOHAWK (arXiv 2408.10189).

    loss = sum over layers of the mean over rows of the batch and heads of |M - A|_F, where M and A are the matrices (see
    `layers.mixing`) of the student's mixer and of the teacher's on the teacher's states. Only what makes the matrices learns:
    queries, keys, gates, convolutions in front of them, skips; not the values and the output projection. Metrics hold every
    layer's mean, `matrix_error/N`. Heads of attention that a hybrid of heads keeps are left out.

    Memory is bounded by blocks of rows, each computed once more in the gradient; a step costs T / rows transposed passes of every
    mixer, so rows of the batch are best short (the paper's have 2,048 tokens).

    Args:
      model: a fused model whose mixers have matrices (`layers.mixer.Mixer`) of as many heads as the teacher's.
      teacher: as of `align`.
      rows: of a block.

    Raises:
      ValueError: a mixer has no matrices, or of another number of heads.
    """
    real = batch["segment_ids"] > 0
    counted = jnp.any(real, axis=1).astype(jnp.float32)

    def compare(taught, student, same, at):
        if same:
            return jnp.zeros(len(real))
        for mixer, _ in (taught, student):
            if not hasattr(mixer, "mixing"):
                raise ValueError(
                    f"align_matrices: {type(mixer).__name__} has no mixing matrices; take another objective for its layer"
                )
        a, m = (mixer.mixing(x, **at) for mixer, x in (taught, student))
        heads, own = a.values.shape[2], m.values.shape[2]
        if own < heads or (own > heads and not isinstance(student[0], HeadHybrid)):
            raise ValueError(f"align_matrices: the student's mixer has {own} heads, the teacher's {heads}; they must be as many")

        def square(begin, a, m):
            inside = jnp.take(real, begin + jnp.arange(a.shape[2]), axis=1, mode="fill", fill_value=False)
            error = jnp.square(m[:, :heads] - jax.lax.stop_gradient(a))
            return jnp.sum(jnp.where(inside[:, None, :, None], error, 0), axis=(2, 3))

        return jnp.mean(safe_sqrt(jnp.sum(over_blocks(square, a, m, rows=rows), axis=0)), axis=1)

    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])
    errors = [Mean.of(x, counted) for x in model.mixers_of_layers(*at, compare, teacher)]
    metrics = {f"matrix_error/{i:02d}": x for i, x in enumerate(errors) if not model.config.layers[i].shared}
    return Outcome(Mean(sum((x.total for x in errors), jnp.zeros(())), jnp.sum(counted)), metrics)


def dpo(
    model: Decoder, batch: Batch, teacher: Decoder | None = None, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Outcome:
    """Direct preference optimization (arXiv 2305.18290) of rows of pairs, see `data.packing`.

    margin = beta * ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r))), with the log-probabilities of the chosen answer c and the
    rejected answer r, sums over their tokens; loss = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin), mean over pairs.
    Metrics, means over pairs: `reward_margin`, `reward_accuracy` (the share of positive margins), `chosen_log_probability` and
    `rejected_log_probability` of the model.

    Args:
      teacher: the reference.
      beta: how much a change of log-probability counts; smaller lets the model move further from the reference. MambaInLlama has
        0.01.
      label_smoothing: s, the probability that a pair is the wrong way round (conservative DPO), below 0.5.
    """
    segments, weights = batch["segment_ids"], batch["weights"]

    def log_probabilities(model: Decoder) -> jax.Array:
        hidden, _ = model.hidden_states(batch["input_ids"], segments, batch["positions"])
        return -(cross_entropy(hidden, model.head, batch["targets"]) * weights)

    def of_pairs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sums over the tokens of the chosen and of the rejected answers, [B, pairs] each, of x [B, T]."""
        own = segments[:, :, None] == 1 + jnp.arange(2 * PAIRS_IN_ROW)
        sums = jnp.sum(jnp.where(own, x[:, :, None], 0), axis=1)
        return sums[:, ::2], sums[:, 1::2]

    found = log_probabilities(model)
    # by tokens first: the sums of long answers are large, and float32 rounds their differences
    chosen, rejected = of_pairs(found - jax.lax.stop_gradient(log_probabilities(teacher or model)))
    margin = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    answers, (of_chosen, of_rejected) = of_pairs(weights), of_pairs(jax.lax.stop_gradient(found))
    real = ((answers[0] > 0) & (answers[1] > 0)).astype(jnp.float32)
    values = {
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).astype(jnp.float32),
        "chosen_log_probability": of_chosen,
        "rejected_log_probability": of_rejected,
    }
    return Outcome(Mean.of(losses, real), {name: Mean.of(x, real) for name, x in values.items()})


def _conflict_of_align(options: Mapping[str, Any]) -> str:
    if options["inputs"] == "teacher" and options["pre_lm_head"]:
        return "with inputs = 'teacher' has no final states of the student to compare; set pre_lm_head = False"
    return ""


_WEIGHTS: dict[str, Callable[[str, Any], Any]] = dict.fromkeys(
    ("divergence_weight", "next_token_weight"), functools.partial(check_number, minimum=0)
)
_NO_WEIGHTS: dict[str, Any] = dict.fromkeys(_WEIGHTS, 0)
_DISTILL = {
    "kind": functools.partial(check_choice, choices=KINDS),
    "temperature": functools.partial(check_number, above=0),
    **_WEIGHTS,
}

OBJECTIVES: dict[str, Objective] = {
    "next_token": Objective(next_token),
    "distill": Objective(distill, two_streams=True, any_teacher=True, checks=_DISTILL, nothing=_NO_WEIGHTS),
    "dpo": Objective(
        dpo,
        reference=True,
        pairs=True,
        checks={
            "beta": functools.partial(check_number, above=0),
            "label_smoothing": functools.partial(check_number, minimum=0, below=0.5),
        },
    ),
    "distill_cached": Objective(
        distill_cached, reads=(*INPUTS, *LABELS, *TEACHER), any_teacher=True, checks=_WEIGHTS, nothing=_NO_WEIGHTS
    ),
    **{
        f"align_{target}": Objective(
            functools.partial(align, target=target),
            reads=INPUTS,
            two_streams=True,
            checks={
                "pre_lm_head": check_boolean,
                "inputs": functools.partial(check_choice, choices=INPUTS_OF_LAYERS),
                "error": functools.partial(check_choice, choices=ERRORS),
            },
            nothing={} if ALIGN_TARGETS[target] else {"pre_lm_head": False},
            conflict=_conflict_of_align,
        )
        for target in ALIGN_TARGETS
    },
    "align_matrices": Objective(
        align_matrices, reads=INPUTS, two_streams=True, checks={"rows": functools.partial(check_integer, minimum=1)}
    ),
}


def make_objective(name: str, options: Mapping) -> Callable[..., Outcome]:
    """Returns the objective of that name with its options: (model, batch, teacher=None) -> `Outcome`.

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
    if problem := objective.conflict({**known, **checked}):
        raise ValueError(f"objective {name!r} {problem}")
    return functools.partial(objective, **checked)
