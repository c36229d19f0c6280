"""Where programs run and batches live: on a mesh, or without one on the default device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.parallel.sharding import TOKENS, partition_spec


def in_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which programs for `mesh` are traced and run."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def any_process_flag(mesh: Mesh | None, value: bool) -> jax.Array:
    """Returns this process's boolean, one element per device.

    `jnp.max` of it in a jitted step tells every process whether any process set it.
    """
    if mesh is None:
        return jax.numpy.asarray([value], "float32")
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), where, lambda _: np.asarray([value], np.float32))


def own_rows(mesh: Mesh | None, batch_size: int) -> list[int]:
    """The rows of a batch of which this process's devices hold a part, rising."""
    if mesh is None:
        return list(range(batch_size))
    parts = NamedSharding(mesh, partition_spec(mesh, TOKENS[:1])).addressable_devices_indices_map((batch_size,))
    return sorted({row for index in parts.values() for part in index or () for row in range(*part.indices(batch_size))})


def to_mesh(mesh: Mesh | None, batch: Mapping[str, np.ndarray], batch_size: int, rows: Sequence[int]) -> dict[str, jax.Array]:
    """A batch as arrays over the mesh, each device with its rows and tokens.

    Args:
      batch: of this process, [len(rows), T] each.
      batch_size: rows of all processes together.
      rows: see `own_rows`.
    """
    if mesh is None:
        return {name: jax.numpy.asarray(x) for name, x in batch.items()}
    where = NamedSharding(mesh, partition_spec(mesh, TOKENS))

    def spread(x):
        def part(index):
            begin, end, _ = index[0].indices(batch_size)
            first = rows.index(begin)
            return x[first : first + end - begin, index[1]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

    return {name: spread(x) for name, x in batch.items()}
