"""A model as a phase trains it: what trains and what is frozen, repeated layers stacked, how everything is sharded.

The loop makes the state with it and the planner its shapes, so both have the same step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, abstract_parameters, join_model, marks, select_names, split_model
from hybrid_jax.priming.fuse import check_teacher, same_function, teacher_stream, unfuse
from hybrid_jax.repeats import Repeat
from hybrid_jax.stacking import stack, stacked_names, stacked_structure, training_repeats, unstack
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.optimizer import make_optimizer
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.state import Health, TrainState
from hybrid_jax.train.teacher import with_student_ids

TEACHER = "teacher: "  # before the names of a teacher's own copies


def parameter_shardings(mesh: Mesh, shapes: Mapping, axes: Mapping[str, tuple]) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by the table of `parallel.sharding`."""
    return {name: parameter_sharding(mesh, name, x.shape, axes[name]) for name, x in shapes.items()}


def trained_names(config: ModelConfig, patterns: Iterable[str]) -> set[str]:
    """The parameters that train. Those that the teacher stream alone reads never do.

    Raises:
      ValueError: a pattern matches no parameter, or none but the teacher's.
    """
    names = abstract_parameters(config)
    teachers = names.keys() - abstract_parameters(config.unfused()).keys()
    chosen = [(pattern, select_names(names, [pattern]) - teachers) for pattern in patterns]
    if empty := [pattern for pattern, found in chosen if not found]:
        raise ValueError(f"the pattern {empty[0]!r} matches only parameters of the teacher, which never trains")
    return set().union(*(found for _, found in chosen))


class PhaseLayout:
    """Of a model (its arrays are not touched) for a phase.

    `structure` is of the stacked model, `names` maps its parameters to those they stand for, `optimizer` is over the
    stacked ones that train. `copied` are the parameters (by its own names) of which the teacher has its own.

    Args:
      teacher: who teaches where the phase's objective has a teacher; default: the model's own teacher stream as it is. Where the
        objective has a reference: that; default: the model's own student stream as it is.
        Parameters that are the same arrays in both are shared while they are frozen (see `priming.fuse.share`). Where the phase
        names a teacher, that model with the student's ids (`train.teacher`), which shares nothing; without it there is none.

    Raises:
      ValueError: a pattern of `phase.trainable` matches nothing, or the teacher cannot teach this model.
    """

    def __init__(self, model: Decoder, phase: Phase, teacher: Decoder | None = None):
        self.phase, self.chosen = phase, trained_names(model.config, phase.trainable)
        self.frozen_dtype, self.config = phase.frozen_dtype, model.config
        repeats = training_repeats(model.config, self.chosen)
        self.names = stacked_names(model.config, repeats)
        self.structure, self.marks = stacked_structure(model, repeats)
        self.axes = {name: mark.axes for name, mark in self.marks.items()}
        self.own_marks = marks(model)
        self.copied, self.teacher_structure, self.source_structure = frozenset(), None, None
        self.teacher_names, self.teacher_marks = self.names, self.marks
        objective = OBJECTIVES[phase.objective]
        if phase.teacher and objective.two_streams:
            if teacher is not None:
                self._lay_out_other_teacher(model, teacher)
        elif objective.two_streams or objective.reference:
            self._lay_out_teacher(model, teacher, repeats, unfuse if objective.reference else teacher_stream)

    def _lay_out_teacher(
        self, model: Decoder, teacher: Decoder | None, repeats: Sequence[Repeat], stream: Callable[[Decoder], Decoder]
    ):
        """What of the teacher is its own: the parameters that differ or train, and its structure where it has any or computes
        otherwise.

        Args:
          stream: the part of a model that teaches, as a model of one stream.
        """
        own = stream(model)
        teacher = own if teacher is None else stream(teacher)
        if stream is teacher_stream:
            check_teacher(model.config, teacher.config)
        teacher.compute_dtype = model.compute_dtype
        have, taught = split_model(own)[1], split_model(teacher)[1]
        differ = {n for n in have if n in self.chosen or taught[n] is not have[n]}
        self.copied = frozenset(n for olds in self.names.values() if differ.intersection(olds) for n in olds)
        self.source_structure = split_model(teacher)[0]
        self.teacher_names = stacked_names(teacher.config, repeats)
        if self.copied or not same_function(own.config, teacher.config):
            self.teacher_structure, self.teacher_marks = stacked_structure(teacher, repeats)

    def _lay_out_other_teacher(self, model: Decoder, teacher: Decoder):
        """Everything of another model than the source is its own."""
        if model.config.is_fused:
            raise ValueError(
                f"phase.teacher {self.phase.teacher} teaches a model that is not fused; this one is {model.config.pattern}: set "
                "phase.form = 'unfused'"
            )
        if teacher.config != with_student_ids(teacher.config, model.config):
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.config.vocab_size}, the model of {model.config.vocab_size}; give it the "
                "model's ids by train.teacher.teach_student_ids"
            )
        teacher.compute_dtype = model.compute_dtype
        self.source_structure, parameters = split_model(teacher)
        self.copied = frozenset(parameters)
        repeats = training_repeats(teacher.config, ())
        self.teacher_names = stacked_names(teacher.config, repeats)
        self.teacher_structure, self.teacher_marks = stacked_structure(teacher, repeats)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.phase, self.marks)

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
        """(those that train, the frozen ones), by the model's own names."""
        chosen = {n: p for n, p in parameters.items() if n in self.chosen}
        return chosen, {n: p for n, p in parameters.items() if n not in self.chosen}

    def make_state(self, trainable: Parameters) -> TrainState:
        """The state to begin with, of copies (a step donates its state); under jit."""
        parameters = {n: jnp.copy(p) for n, p in stack(trainable, self.names).items()}
        return TrainState(parameters, self.optimizer.init(parameters), Health.new())

    def copies(self, teacher: Mapping) -> dict:
        """Of a teacher's parameters (or their shapes), by its own names, those of which it has its own."""
        return {n: teacher[n] for n in sorted(self.copied)}

    def make_frozen(self, frozen: Parameters, copies: Parameters) -> Parameters:
        """What does not train and the teacher's `copies`, matrices in `frozen_dtype`; under jit.

        A reference's copies are of what trains, which is not rounded: they are only where the model computes with the same numbers.
        """
        own, marks = stack(self.rounded(frozen), self.names), self.teacher_marks
        if OBJECTIVES[self.phase.objective].reference:
            computed = self.frozen_dtype == self.phase.compute_dtype
            marks = {n: dataclasses.replace(m, frozen=m.frozen and m.compute and computed) for n, m in marks.items()}
        copied = self._cast(stack(copies, self.teacher_names), marks)
        return {**own, **{TEACHER + n: jnp.copy(p) for n, p in copied.items()}}

    def rounded(self, frozen: Parameters) -> Parameters:
        """Returns parameters that do not train as the phase has them: those marked `frozen` in `frozen_dtype`."""
        return self._cast(frozen, self.own_marks)

    def _cast(self, parameters: Parameters, marks: Mapping[str, Marks]) -> Parameters:
        return {n: p.astype(self.frozen_dtype) if self.frozen_dtype and marks[n].frozen else p for n, p in parameters.items()}

    def frozen_shardings(self, mesh: Mesh, frozen: Mapping) -> dict[str, NamedSharding]:
        """Of `make_frozen`'s parameters (or their shapes)."""
        return parameter_shardings(mesh, frozen, {**self.axes, **{TEACHER + n: m.axes for n, m in self.teacher_marks.items()}})

    def models(self, trainable: Parameters, frozen: Parameters) -> tuple[Decoder, Decoder | None]:
        """The model, and the teacher where it is not the model's own frozen part; the teacher takes no gradient."""
        own = {n: p for n, p in frozen.items() if not n.startswith(TEACHER)}
        model = join_model(self.structure, {**trainable, **own})
        if self.teacher_structure is None:
            return model, None
        copies = {n.removeprefix(TEACHER): p for n, p in frozen.items() if n.startswith(TEACHER)}
        fixed = {n: p for n, p in {**own, **copies}.items() if n in self.teacher_names}
        return model, join_model(self.teacher_structure, jax.lax.stop_gradient(fixed))

    def parameters(self, state: TrainState, frozen: Parameters) -> Parameters:
        """All parameters by the model's own names."""
        return unstack({**state.trainable, **{n: p for n, p in frozen.items() if not n.startswith(TEACHER)}}, self.names)

    def source(self, state: TrainState, frozen: Parameters) -> Decoder | None:
        """Who teaches, its layers not stacked; None where the objective has no teacher."""
        if self.source_structure is None:
            return None
        own = {n: p for n, p in {**state.trainable, **frozen}.items() if not n.startswith(TEACHER)}
        copies = {n.removeprefix(TEACHER): p for n, p in frozen.items() if n.startswith(TEACHER)}
        return join_model(self.source_structure, unstack({**own, **copies}, self.teacher_names))

    def state_shardings(self, mesh: Mesh, state: TrainState) -> TrainState:
        """Returns the shardings of a state (or its shapes): moments are sharded as their parameters, the rest is replicated."""
        own, replicated = parameter_shardings(mesh, state.trainable, self.axes), NamedSharding(mesh, PartitionSpec())
        moments = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            state.optimizer,
            own,
            transform_non_params=lambda _: replicated,
        )
        return TrainState._make([own, moments, Health._make([replicated] * len(Health._fields))])

    def begin(
        self, mesh: Mesh | None, parameters: Parameters, teacher: Parameters | None = None
    ) -> tuple[TrainState, Parameters, TrainState | None]:
        """The state, the frozen parameters and the state's shardings, from a model's parameters and its teacher's (default: the
        model's)."""
        trainable, frozen = self.split(parameters)
        copies = self.copies(teacher or parameters)
        where = frozen_where = None
        if mesh is not None:
            where = self.state_shardings(mesh, jax.eval_shape(self.make_state, trainable))
            frozen_where = self.frozen_shardings(mesh, jax.eval_shape(self.make_frozen, frozen, copies))
        state = jax.jit(self.make_state, out_shardings=where)(trainable)
        return state, jax.jit(self.make_frozen, out_shardings=frozen_where)(frozen, copies), where
