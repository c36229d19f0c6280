"""Where programs run and batches live: on a mesh, or without one on the default device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hybrid_jax.parallel.sharding import TOKENS, partition_spec, put


def in_mesh(mesh: Mesh | None):
    """The context in which programs for `mesh` are traced and run."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_mesh(mesh: Mesh | None, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every process holds whole -> one array, each device with its rows and tokens."""
    if mesh is None:
        return {name: jax.numpy.asarray(x) for name, x in batch.items()}
    where = NamedSharding(mesh, partition_spec(mesh, TOKENS))
    return {n: put(x, where) for n, x in batch.items()}
