"""What every operation does at its door: pick an implementation, check shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

NOT_BUILT = ("pallas_tpu", "pallas_gpu")


def pick_implementation(name: str | None, table: Mapping[str, Callable]) -> Callable:
    """The implementation called `name`; None means `xla`.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: it has a place in the plan but no code yet.
    """
    name = name or "xla"
    if name in table:
        return table[name]
    if name in NOT_BUILT:
        raise NotImplementedError(f"implementation={name!r} is not built yet; have {', '.join(table)}")
    raise ValueError(f"unknown implementation {name!r}; have {', '.join(table)}")


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


def segment_index(segment_ids: jax.Array | None, B: int, T: int) -> jax.Array:
    """[B,T] number of id changes up to each token: 0 for a row's first segment, rising."""
    if segment_ids is None:
        return jnp.zeros((B, T), jnp.int32)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(change, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
