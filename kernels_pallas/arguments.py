"""What every operation does at its door: pick an implementation, check shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

BEST = {"tpu": "pallas_tpu"}  # by backend; every other one: "xla"


def backend() -> str:
    """The backend a program is traced for: that of the mesh in context (`jax.set_mesh`), else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if device.device_kind.startswith("TPU") else "cpu" if device.device_kind == "cpu" else "gpu"


def partitioned_by_compiler() -> bool:
    """Whether the mesh in context leaves some partitioning to the compiler, which can not cut a Pallas kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    return any(n > 1 and kind != manual for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True))


def pick_implementation(op: str, name: str | None, table: Mapping[str, Callable], *arrays: jax.Array) -> Callable:
    """The implementation called `name`; None means the best one for the backend, the mesh and the inputs' dtypes.

    Raises:
      ValueError: no implementation has that name, or it can not compute in float64.
    """
    double = any(x.dtype == jnp.float64 for x in arrays)
    if name is None:
        name = "xla" if double or partitioned_by_compiler() else BEST.get(backend(), "xla")
        name = name if name in table else "xla"
    if name not in table:
        raise ValueError(f"{op}: unknown implementation {name!r}; have {', '.join(table)}")
    if double and name.startswith("pallas"):
        raise ValueError(f"{op}: {name} has no float64; cast the inputs, or use 'xla' or 'reference'")
    return table[name]


def check_shapes(op: str, dims: dict[str, int], **arrays: tuple[jax.Array | None, str]):
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


def dims_of(op: str, q: jax.Array, v: jax.Array) -> dict[str, int]:
    """B, T, H, K from q [B,T,H,K] and V from v [B,T,H,V].

    Raises:
      ValueError: q or v has not four axes, or T is 0.
    """
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{op}: q and v must be [B, T, H, D], got {tuple(q.shape)} and {tuple(v.shape)}")
    if q.shape[1] == 0:
        raise ValueError(f"{op}: needs at least one token, got T = 0")
    B, T, H, K = q.shape
    return dict(B=B, T=T, H=H, K=K, V=v.shape[-1])


def accumulator(*arrays) -> jnp.dtype:
    """float32, or float64 when an input is float64: the dtype of states and sums."""
    return jnp.result_type(jnp.float32, *(a.dtype for a in arrays))


def segment_index(segment_ids: jax.Array | None) -> jax.Array | None:
    """[B,T] number of id changes up to each token: 0 for a row's first segment, rising; None stays None."""
    if segment_ids is None:
        return None
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(change, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
