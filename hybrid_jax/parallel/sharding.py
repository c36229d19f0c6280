"""Sharding: the one table from logical axes to mesh axes, of parameters and of activations.

The compiler propagates shardings from there (GSPMD). What it can not cut, a Pallas kernel or a ring, runs
under `shard_map_by_axes`, each device on its own part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybrid_jax.parallel.mesh import BATCH_AXES
from kernels_pallas.arguments import partitioned_by_compiler, refuse_explicit

# Logical axis -> mesh axes. Axes that a mesh lacks, or that are not listed, are replicated; of two dimensions that
# name one mesh axis the earlier has it.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp", "seq", "expert"),  # no device that works on other tokens need hold what it can fetch
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    # activations
    "batch": BATCH_AXES,
    "sequence": ("seq",),
}
Axes = tuple[str | None, ...]
TOKENS: Axes = ("batch", "sequence")  # how every [B,T,...] lies


def partition_spec(mesh, axes: Axes) -> PartitionSpec:
    """Where an array with these logical axes lies; mesh axes of size 1 are left out."""
    entries, used = [], set()
    for axis in axes:
        names = tuple(a for a in RULES.get(axis or "", ()) if mesh.shape.get(a, 1) > 1 and a not in used)
        used.update(names)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    """Where a parameter lives.

    Raises:
      ValueError: a mesh axis does not divide the dimension; names both.
    """
    spec = partition_spec(mesh, axes)
    for size, axis, entry in zip(shape, axes, spec, strict=True):
        names = (entry,) if isinstance(entry, str) else entry or ()
        parts, cut = math.prod(mesh.shape[a] for a in names), "*".join(names)
        if size % parts:
            raise ValueError(
                f"mesh axis {cut!r} of size {parts} does not divide {axis!r} of {name} {tuple(shape)}: {size}; "
                f"choose a mesh whose {cut!r} divides it"
            )
    if isinstance(mesh, Mesh):  # whatever axis types the caller's has
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(mesh, spec)


def load_sharded(mesh: Mesh | None, name: str, value, axes: Axes) -> jax.Array:
    """Puts a host array straight into its final sharding."""
    if mesh is None:
        return jax.numpy.asarray(value)
    return to_global(value, parameter_sharding(mesh, name, value.shape, axes))


def to_global(value, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole as one over the mesh, each device with its part."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def context_mesh():
    """The mesh in context (`jax.set_mesh`) if it spreads anything and we are not inside `shard_map_by_axes`; else None.

    Raises:
      ValueError: an axis of it is Explicit: the compiler is to propagate shardings from the table above.
    """
    refuse_explicit("hybrid_jax")
    return jax.sharding.get_abstract_mesh() if partitioned_by_compiler() else None


def axis_size(name: str) -> int:
    """Size of an axis of the mesh in context; 1 without one."""
    mesh = context_mesh()
    return 1 if mesh is None else mesh.shape.get(name, 1)


def mesh_axes_of(logical: str) -> tuple[str, ...]:
    """The axes of the mesh in context that cut a logical axis."""
    return tuple(axis for axis in RULES[logical] if axis_size(axis) > 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out by its logical axes where a mesh is in context."""
    mesh = context_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, axes: Axes) -> jax.Array:
    """A parameter that lies by its logical axes, on every device whole but for `tensor` and `expert`.

    Its gradient is cut as the parameter is: scattered as it is summed, half the bytes of a sum that all devices get.
    """
    return constrain(x, *(None if axis == "embed" else axis for axis in axes))


gathered.defvjp(lambda x, axes: (gathered(x, axes), None), lambda axes, _, d: (constrain(d, *axes),))


def shard_map_by_axes(function: Callable, arrays: Sequence, axes: Sequence, out_axes):
    """function(*arrays), each device on its own part of every array.

    Args:
      axes: for every array its leading logical axes; of a pytree, those that all its arrays begin with.
      out_axes: the same for the result, or a tuple of them for a tuple.
    """
    mesh = context_mesh()
    if mesh is None:
        return function(*arrays)

    def spec(axes):
        return partition_spec(mesh, axes)

    out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes[0], tuple) else spec(out_axes)
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(map(spec, axes)), out_specs=out_specs, check_vma=False)(*arrays)
