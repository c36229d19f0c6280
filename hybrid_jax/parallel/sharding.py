"""Sharding of parameters: the one table from logical axes to mesh axes."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis of a parameter -> mesh axis. Axes that a mesh lacks, or that are not listed, are replicated.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
}


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Where a parameter lives. The compiler propagates shardings from there (GSPMD), whatever axis types `mesh` has.

    Raises:
      ValueError: a mesh axis does not divide the dimension; names both.
    """
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axis = RULES.get(axis) if axis else None
        parts = mesh.shape.get(mesh_axis, 1) if mesh_axis else 1
        if size % parts:
            raise ValueError(
                f"mesh axis {mesh_axis!r} of size {parts} does not divide {axis!r} of {name} {tuple(shape)}: {size}; "
                f"choose a mesh whose {mesh_axis!r} divides it"
            )
        spec.append(mesh_axis if parts > 1 else None)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(*spec))


def place(mesh: Mesh | None, name: str, value, axes) -> jax.Array:
    """Puts a host array straight into its final sharding."""
    if mesh is None:
        return jax.numpy.asarray(value)
    return jax.device_put(value, parameter_sharding(mesh, name, value.shape, axes))
