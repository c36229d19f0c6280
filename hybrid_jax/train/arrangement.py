"""A model as a phase trains it: what trains and what is frozen, repeated layers stacked, where on a mesh everything lies.

The loop makes the state with it and the planner its shapes, so both have the same step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.config import PARAMETER_KEYS
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, abstract_parameters, join_model, select_names
from hybrid_jax.stacking import stack, stacked_names, stacked_structure, training_runs, unstack
from hybrid_jax.train.checkpoint import Health, TrainState
from hybrid_jax.train.optimizer import make_optimizer
from hybrid_jax.train.phase import Phase

TEACHER = "teacher: "  # before the names of a teacher's own copies


def parameter_shardings(mesh: Mesh, shapes: Mapping, axes: Mapping[str, tuple]) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by the table of `parallel.sharding`."""
    return {name: parameter_sharding(mesh, name, x.shape, axes[name]) for name, x in shapes.items()}


class Arrangement:
    """Of a model (its arrays are not touched) for a phase.

    `structure` is of the stacked model, `names` maps its parameters to those they stand for, `optimizer` is over the
    stacked ones that train.

    Raises:
      ValueError: a pattern of `phase.trainable` matches nothing.
    """

    def __init__(self, model: Decoder, phase: Phase):
        names = abstract_parameters(model.config)
        self.phase, self.chosen = phase, select_names(names, phase.trainable)
        self.frozen_dtype, self.config = phase.frozen_dtype, model.config
        runs = training_runs(model.config, self.chosen)
        self.names = stacked_names(model.config, runs)
        self.structure, self.axes = stacked_structure(model, runs)
        self.copied = self._taught() if phase.objective == "distill" else frozenset()

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.phase)

    def _taught(self) -> frozenset[str]:
        """The parameters that train and that the teacher reads too: of those it needs copies that stay."""
        own = tuple(
            f"layers.{i}.{PARAMETER_KEYS[s.kind]}." for i, s in enumerate(self.config.layers) if s.fused and s.kind != s.teacher
        )
        return frozenset(n for n in self.chosen if not n.startswith(own))

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
        """(those that train, the frozen ones), by the model's own names."""
        chosen = {n: p for n, p in parameters.items() if n in self.chosen}
        return chosen, {n: p for n, p in parameters.items() if n not in self.chosen}

    def make_state(self, trainable: Parameters) -> TrainState:
        """The state to begin with, of copies (a step donates its state); under jit."""
        parameters = {n: jnp.copy(p) for n, p in stack(trainable, self.names).items()}
        return TrainState(parameters, self.optimizer.init(parameters), Health.new())

    def make_frozen(self, frozen: Parameters, trainable: Parameters) -> Parameters:
        """What does not train, matrices in `frozen_dtype`, and the teacher's copies of what does; under jit."""

        def low(parameters):
            dtype = self.frozen_dtype
            return stack({n: p.astype(dtype) if dtype and p.ndim > 1 else p for n, p in parameters.items()}, self.names)

        copies = low({n: jnp.copy(p) for n, p in trainable.items() if n in self.copied})
        return {**low(frozen), **{TEACHER + n: p for n, p in copies.items()}}

    def frozen_shardings(self, mesh: Mesh, frozen: Mapping) -> dict[str, NamedSharding]:
        """Of `make_frozen`'s parameters (or their shapes)."""
        return parameter_shardings(mesh, frozen, {**self.axes, **{TEACHER + n: a for n, a in self.axes.items()}})

    def models(self, trainable: Parameters, frozen: Parameters) -> tuple[Decoder, Decoder | None]:
        """The model, and the teacher where it is not the model's own frozen part."""
        own = {n: p for n, p in frozen.items() if not n.startswith(TEACHER)}
        model = join_model(self.structure, {**trainable, **own})
        if not self.copied:
            return model, None
        copies = {n.removeprefix(TEACHER): p for n, p in frozen.items() if n.startswith(TEACHER)}
        fixed = jax.lax.stop_gradient({**trainable, **own})
        return model, join_model(self.structure, {**fixed, **copies})

    def parameters(self, state: TrainState, frozen: Parameters) -> Parameters:
        """All parameters by the model's own names."""
        return unstack({**state.trainable, **{n: p for n, p in frozen.items() if not n.startswith(TEACHER)}}, self.names)

    def state_shardings(self, mesh: Mesh, state: TrainState) -> TrainState:
        """Of a state (or its shapes): moments lie with their parameters, the rest is replicated."""
        own, replicated = parameter_shardings(mesh, state.trainable, self.axes), NamedSharding(mesh, PartitionSpec())
        moments = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            state.optimizer,
            own,
            transform_non_params=lambda _: replicated,
        )
        return TrainState(own, moments, Health(*[replicated] * len(Health._fields)))

    def begin(self, mesh: Mesh | None, parameters: Parameters) -> tuple[TrainState, Parameters, TrainState | None]:
        """The state, the frozen parameters and the state's shardings, from a model's parameters."""
        trainable, frozen = self.split(parameters)
        where = frozen_where = None
        if mesh is not None:
            where = self.state_shardings(mesh, jax.eval_shape(self.make_state, trainable))
            frozen_where = self.frozen_shardings(mesh, jax.eval_shape(self.make_frozen, frozen, trainable))
        state = jax.jit(self.make_state, out_shardings=where)(trainable)
        return state, jax.jit(self.make_frozen, out_shardings=frozen_where)(frozen, trainable), where
