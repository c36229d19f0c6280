"""A model as a phase trains it: what trains and what is frozen, repeated layers stacked, where on a mesh everything lies.

The loop makes the state with it and the planner its shapes, so both have the same step.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.model import Decoder
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, abstract_parameters, select_names
from hybrid_jax.stacking import stack, stacked_names, stacked_structure, training_runs, unstack
from hybrid_jax.train.checkpoint import TrainState
from hybrid_jax.train.optimizer import make_optimizer
from hybrid_jax.train.phase import Phase


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
        self.chosen = select_names(names, phase.trainable)
        self.frozen_dtype = phase.frozen_dtype
        runs = training_runs(model.config, self.chosen)
        self.names = stacked_names(model.config, runs)
        self.structure, self.axes = stacked_structure(model, runs)
        self.stacked = frozenset(n for n, olds in self.names.items() if len(olds) > 1)
        self.optimizer = make_optimizer(phase, self.stacked)

    def split(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
        """(those that train, the frozen ones), by the model's own names."""
        chosen = {n: p for n, p in parameters.items() if n in self.chosen}
        return chosen, {n: p for n, p in parameters.items() if n not in self.chosen}

    def make_state(self, trainable: Parameters) -> TrainState:
        """The state to begin with, of copies (a step donates its state); under jit."""
        parameters = {n: jnp.copy(p) for n, p in stack(trainable, self.names).items()}
        return TrainState(parameters, self.optimizer.init(parameters))

    def make_frozen(self, frozen: Parameters) -> Parameters:
        """What does not train, matrices in `frozen_dtype`; under jit."""
        low = self.frozen_dtype
        return stack({n: p.astype(low) if low and p.ndim > 1 else p for n, p in frozen.items()}, self.names)

    def parameters(self, state: TrainState, frozen: Parameters) -> Parameters:
        """All parameters by the model's own names."""
        return unstack({**state.trainable, **frozen}, self.names)

    def state_shardings(self, mesh: Mesh, state: TrainState) -> TrainState:
        """Of a state (or its shapes): moments lie with their parameters, the rest is replicated."""
        own = parameter_shardings(mesh, state.trainable, self.axes)
        moments = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            state.optimizer,
            own,
            transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        )
        return TrainState(own, moments)

    def begin(self, mesh: Mesh | None, parameters: Parameters) -> tuple[TrainState, Parameters, TrainState | None]:
        """The state, the frozen parameters and the state's shardings, from a model's parameters."""
        trainable, frozen = self.split(parameters)
        where = frozen_where = None
        if mesh is not None:
            where = self.state_shardings(mesh, jax.eval_shape(self.make_state, trainable))
            frozen_where = parameter_shardings(mesh, jax.eval_shape(self.make_frozen, frozen), self.axes)
        state = jax.jit(self.make_state, out_shardings=where)(trainable)
        return state, jax.jit(self.make_frozen, out_shardings=frozen_where)(frozen), where
