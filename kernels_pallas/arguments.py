"""What every operation does before it calls an implementation: it picks one, and checks shapes and options."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, overload

import jax
import jax.numpy as jnp

Returned = TypeVar("Returned")
Entry = TypeVar("Entry", bound=Callable)

BEST = {"tpu": "pallas_tpu"}  # by backend; every other one: "xla"


def backend() -> str:
    """Returns the backend that a program is traced for: that of the mesh in context (`jax.set_mesh`), else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if device.device_kind.startswith("TPU") else "cpu" if device.device_kind == "cpu" else "gpu"


def partitioned_by_compiler() -> bool:
    """Returns whether the mesh in context leaves some partitioning to the compiler, which cannot partition a Pallas kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    return any(n > 1 and kind != manual for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True))


def explicit_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of a mesh larger than 1 that are of type Explicit, whose shardings are part of every array's type."""
    explicit = jax.sharding.AxisType.Explicit
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return tuple(name for name, size, kind in axes if size > 1 and kind == explicit)


EXPLICIT_ADVICE = (
    "make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * n (jax.make_mesh makes Explicit axes by default), "
    "or call it inside jax.shard_map"
)


def refuse_explicit(op: str, *arrays: jax.Array) -> None:
    """Checks that no mesh in context or of an array has Explicit axes, with which the loops of an operation do not type-check.

    Raises:
      ValueError: names the axes and what to do.
    """
    for mesh in (jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)):
        if names := explicit_axes(mesh):
            raise ValueError(
                f"{op}: the mesh axes {', '.join(names)} are of type Explicit, which it does not support; {EXPLICIT_ADVICE}"
            )


def alike(op: str, *trees: Any) -> tuple[Any, ...]:
    """Returns pytrees of arrays (or None) whose types agree in the mesh axes that they vary over.

    Inside `jax.shard_map` with `check_vma`, its default, the loops of an operation need a state of one type; a
    replicated input thus counts as varying, and its gradient is summed over the axes that it is replicated on.

    Raises:
      ValueError: an axis of the mesh is Explicit.
    """
    leaves = jax.tree.leaves(trees)
    refuse_explicit(op, *leaves)
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))

    def vary(x):
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(vary, trees)


def pick_implementation(op: str, name: str | None, table: Mapping[str, Entry], *arrays: jax.Array) -> Entry:
    """Returns the implementation called `name`; None means the best one for the backend, the mesh and the inputs' dtypes.

    Args:
      op: the operation's name, for messages.
      table: implementations by name; `contract` says what they receive and return.
      arrays: the inputs.

    Raises:
      ValueError: no implementation has that name, it cannot compute in float64, or an axis of the mesh is Explicit.
    """
    refuse_explicit(op, *arrays)
    double = any(x.dtype == jnp.float64 for x in arrays)
    if name is None:
        name = "xla" if double or partitioned_by_compiler() else BEST.get(backend(), "xla")
        name = name if name in table else "xla"
    if name not in table:
        raise ValueError(f"{op}: unknown implementation {name!r}; have {', '.join(table)}")
    if double and name.startswith("pallas"):
        raise ValueError(f"{op}: {name} has no float64; cast the inputs, or use 'xla' or 'reference'")
    return table[name]


def check_floating(op: str, **arrays: jax.Array) -> None:
    """Checks that arrays hold floating-point numbers.

    Raises:
      ValueError: names the array and its dtype.
    """
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} must have a floating-point dtype, got {array.dtype}")


def check_shapes(op: str, dims: dict[str, int], **arrays: tuple[jax.Array | None, str]) -> None:
    """Checks arrays against axis letters, e.g. `k=(k, "B T H K")`; None passes.

    Raises:
      ValueError: says the axes wanted and the shape that came.
    """
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        want = tuple(dims[a] for a in axes.split())
        if tuple(array.shape) != want:
            raise ValueError(f"{op}: {name} must be [{axes.replace(' ', ', ')}] = {want}, got {tuple(array.shape)}")


def dims_of(op: str, first: jax.Array, v: jax.Array, name: str = "q", axes: str = "B T H") -> dict[str, int]:
    """Returns the sizes of `axes` and K, from an operation's first array, called `name`, [B,T,H,K], and V from v [B,T,H,V].

    Raises:
      ValueError: one of them has not these axes, or T is 0.
    """
    letters = axes.split()
    if first.ndim != len(letters) + 1 or v.ndim != first.ndim:
        want = f"[{', '.join(letters)}, D]"
        raise ValueError(f"{op}: {name} and v must be {want}, got {tuple(first.shape)} and {tuple(v.shape)}")
    dims = dict(zip((*letters, "K"), first.shape, strict=True), V=v.shape[-1])
    if dims.get("T") == 0:
        raise ValueError(f"{op}: needs at least one token, got T = 0")
    return dims


def scale_or_default(scale: float | None, K: int) -> float:
    """Returns the scale, or the default for keys of K dims, K^-0.5."""
    return K**-0.5 if scale is None else scale


def check_options(
    op: str,
    *,
    scale: float = 1.0,
    chunk_size: int | None = None,
    num_iter: int = 0,
    ridge_strength: float = 1.0,
    eps: float = 1.0,
) -> None:
    """Checks the numbers that an operation is built with.

    Raises:
      ValueError: names the option and what it must be.
    """
    for name, value, right, want in (
        ("scale", scale, math.isfinite(scale) and scale != 0, "a finite number other than 0 (None: the default)"),
        ("chunk_size", chunk_size, chunk_size is None or chunk_size > 0, "1 or more tokens (None: the default)"),
        ("num_iter", num_iter, num_iter >= 0 and num_iter == int(num_iter), "an integer, 0 or more"),
        ("ridge_strength", ridge_strength, math.isfinite(ridge_strength) and ridge_strength > 0, "a finite number above 0"),
        ("eps", eps, math.isfinite(eps) and eps >= jnp.finfo(jnp.float32).tiny, "a finite number above 0 that float32 has"),
    ):
        if not right:
            raise ValueError(f"{op}: {name} must be {want}, got {value!r}")


def accumulator(*arrays: jax.Array | None) -> jnp.dtype:
    """Returns float32, or float64 if an input is float64: the dtype of states and sums."""
    return jnp.result_type(jnp.float32, *(a.dtype for a in arrays if a is not None))


def differentiable(*static: int) -> Callable[[Callable[..., Returned]], jax.custom_vjp[Returned]]:
    """Returns `jax.custom_vjp` for a function whose arguments number `static` are Python values.

    A type checker sees the function's return type through it, which it does not through `functools.partial`.
    """
    return functools.partial(_differentiable, static)


def _differentiable(static: tuple[int, ...], f: Callable[..., Returned]) -> jax.custom_vjp[Returned]:
    return cast("jax.custom_vjp[Returned]", jax.custom_vjp(f, nondiff_argnums=static))


@overload
def segment_index(segment_ids: jax.Array) -> jax.Array: ...
@overload
def segment_index(segment_ids: None) -> None: ...
def segment_index(segment_ids: jax.Array | None) -> jax.Array | None:
    """Returns [B, T] int32, the number of changes of the id up to each token: 0 in a row's first segment, rising; None for None."""
    if segment_ids is None:
        return None
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(change, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
