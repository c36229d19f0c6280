"""Where the training state and the batches live on a mesh; without a mesh, on the default device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.parallel.sharding import parameter_sharding, partition_spec
from hybrid_jax.train.checkpoint import TrainState

BATCH = ("batch", "sequence")


def in_mesh(mesh: Mesh | None):
    """The context in which programs for `mesh` are traced and run."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def parameter_shardings(mesh: Mesh, shapes: Mapping[str, jax.Array], axes: Mapping[str, tuple]) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by the table of `parallel.sharding`."""
    return {name: parameter_sharding(mesh, name, x.shape, axes[name]) for name, x in shapes.items()}


def state_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, trainable: Mapping, shardings: Mapping) -> TrainState:
    """Shardings of the training state: moments lie with their parameters, the rest is replicated."""
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in trainable.items()}
    own = {n: shardings[n] for n in trainable}
    replicated = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        own,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(own, moments)


def initial_state(
    mesh: Mesh | None, optimizer: optax.GradientTransformation, trainable: Mapping, axes: Mapping
) -> tuple[TrainState, TrainState | None]:
    """A state of copies of `trainable` (a step donates its state) and its shardings."""

    def make(trainable):
        return TrainState(dict(trainable), optimizer.init(trainable))

    if mesh is None:
        return TrainState({n: jax.numpy.array(p, copy=True) for n, p in trainable.items()}, optimizer.init(trainable)), None
    where = state_shardings(mesh, optimizer, trainable, parameter_shardings(mesh, trainable, axes))
    return jax.jit(make, out_shardings=where)(dict(trainable)), where


def to_mesh(mesh: Mesh | None, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every process holds whole -> one array, each device with its rows and tokens."""
    if mesh is None:
        return {name: jax.numpy.asarray(x) for name, x in batch.items()}
    where = NamedSharding(mesh, partition_spec(mesh, BATCH))
    return {n: jax.make_array_from_callback(x.shape, where, lambda index, x=x: x[index]) for n, x in batch.items()}
