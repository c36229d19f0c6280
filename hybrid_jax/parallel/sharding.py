"""Sharding: the one table from logical axes to mesh axes, of parameters and of activations.

The compiler propagates shardings from there (GSPMD). What it cannot partition, a Pallas kernel or a ring, runs under
`shard_map_by_axes`, where each device works on its own shard. Logical axes exist so that a strategy is one row of the table: to
shard, say, `mlp` over another mesh axis, change its row, and parameters, activations, checkpoints and plans follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybrid_jax.parallel.mesh import BATCH_AXES
from kernels_pallas.arguments import differentiable, partitioned_by_compiler, refuse_explicit

# Logical axis -> mesh axes. A dim whose logical axis is absent here, or whose mesh axes the mesh lacks, is replicated; if two
# dims map to the same mesh axis, the first one gets it.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp", "seq", "expert"),  # devices that work on other tokens gather parameters instead of holding copies
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
TOKENS: Axes = ("batch", "sequence")  # of every [B, T, ...]


def partition_spec(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes; mesh axes of size 1 are left out."""
    entries, used = [], set()
    for axis in axes:
        names = tuple(a for a in RULES.get(axis or "", ()) if mesh.shape.get(a, 1) > 1 and a not in used)
        used.update(names)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    """Returns the sharding of a parameter.

    Raises:
      ValueError: a mesh axis does not divide the dimension; names both.
    """
    spec = partition_spec(mesh, axes)
    for size, axis, entry in zip(shape, axes, spec, strict=True):
        names = (entry,) if isinstance(entry, str) else entry or ()
        parts, label = math.prod(mesh.shape[a] for a in names), "*".join(names)
        if size % parts:
            raise ValueError(
                f"mesh axis {label!r} of size {parts} does not divide {axis!r} of {name} {tuple(shape)}: {size}; "
                f"choose a mesh whose {label!r} divides it"
            )
    if isinstance(mesh, Mesh):  # whatever axis types the caller's has
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(mesh, spec)


def load_sharded(mesh: Mesh | None, name: str, value: Any, axes: Axes) -> jax.Array:
    """Returns a host array as a parameter in its final sharding, without a replicated copy on the way.

    Args:
      value: the array, or anything with a shape of which `value[slices]` and `value[...]` are arrays: only the parts that this
        process's devices hold are asked for.
    """
    if mesh is None:
        return jax.numpy.asarray(value[...])
    return to_global(value, parameter_sharding(mesh, name, value.shape, axes))


def to_global(value: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array that every process has completely as a global array; each device gets its shard."""
    parts = {}  # replicas ask for the same part

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = value[index]
        return parts[key]

    return jax.make_array_from_callback(value.shape, sharding, part)


def context_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the mesh in context (`jax.set_mesh`), or None if it has one device or we are inside `shard_map_by_axes`.

    Raises:
      ValueError: an axis of it is Explicit: the compiler is to propagate shardings from the table above.
    """
    refuse_explicit("hybrid_jax")
    return jax.sharding.get_abstract_mesh() if partitioned_by_compiler() else None


def axis_size(name: str) -> int:
    """Returns the size of an axis of the mesh in context; 1 without a mesh."""
    mesh = context_mesh()
    return 1 if mesh is None else mesh.shape.get(name, 1)


def mesh_axes_of(logical: str) -> tuple[str, ...]:
    """Returns the axes of the mesh in context that shard a logical axis."""
    return tuple(axis for axis in RULES[logical] if axis_size(axis) > 1)


def divides_heads(heads: int, axis: str | None = "heads") -> bool:
    """Returns whether the mesh in context gives every device along the logical `axis` as many complete heads; None: all of them."""
    return axis is None or heads % math.prod(map(axis_size, mesh_axes_of(axis))) == 0


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of x to its logical axes, if a mesh is in context."""
    mesh = context_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes))


@differentiable(1)
def gathered(x: jax.Array, axes: Axes) -> jax.Array:
    """All-gathers a parameter over the mesh axes of `embed`; it stays sharded over `tensor` and `expert`.

    Its gradient is reduce-scattered to the parameter's own sharding, which is half the bytes of an all-reduce.
    """
    return constrain(x, *(None if axis == "embed" else axis for axis in axes))


gathered.defvjp(lambda x, axes: (gathered(x, axes), None), lambda axes, _, d: (constrain(d, *axes),))


def shard_map_by_axes(function: Callable, arrays: Sequence, axes: Sequence, out_axes: Any) -> Any:
    """Runs function(*arrays) on each device with its shard of every array; without a mesh, once with the arrays.

    Args:
      axes: the leading logical axes of each array; for a pytree, those that all its arrays begin with.
      out_axes: the same for the result, or a tuple of them for a tuple.
    """
    mesh = context_mesh()
    if mesh is None:
        return function(*arrays)

    def spec(axes):
        return partition_spec(mesh, axes)

    out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes[0], tuple) else spec(out_axes)
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(map(spec, axes)), out_specs=out_specs, check_vma=False)(*arrays)
