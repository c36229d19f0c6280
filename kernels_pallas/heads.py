"""Keys and values with fewer heads than the queries: head h of the result reads head h // (H / heads), as in grouped attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import differentiable, dims_of

Entry = TypeVar("Entry", bound=Callable)


def repeat_heads(x: jax.Array, H: int) -> jax.Array:
    """Returns x [..., heads, D] as [..., H, D], every head repeated in place H / heads times; heads must divide H.

    Its gradient, the sum over a group, is added up in float32 (float64 if x is) and rounded to x's dtype once.
    """
    return x if x.shape[-2] == H else _repeat(x, x.shape[-2], H)


@differentiable(1, 2)
def _repeat(x, heads, H) -> jax.Array:
    return jnp.repeat(x, H // heads, axis=-2)


def _repeat_backward(heads, H, _, d):
    groups = d.reshape(*d.shape[:-2], heads, H // heads, d.shape[-1])
    return (jnp.sum(groups.astype(jnp.promote_types(d.dtype, jnp.float32)), axis=-2).astype(d.dtype),)


_repeat.defvjp(lambda x, heads, H: (_repeat(x, heads, H), None), _repeat_backward)


def with_groups(run: Entry) -> Entry:
    """Returns an implementation for k, v of fewer heads from one that takes (q, k, v, ...) [B, T, H, *] of as many heads each."""

    def repeated(q, k, v, *others):
        H = q.shape[-2]
        return run(q, repeat_heads(k, H), repeat_heads(v, H), *others)

    return cast("Entry", repeated)


def grouped(op: str, dims: dict[str, int], of: str = "q", **arrays: jax.Array) -> dict[str, int]:
    """Returns `dims` with the number of heads of each array, the axis before the last one: `Hk` of the array called `k`.

    Args:
      op: the operation's name, for the message.
      dims: has H.
      of: the name of the array whose heads H counts.

    Raises:
      ValueError: an array's heads do not divide H.
    """
    found, H = dict(dims), dims["H"]
    for name, x in arrays.items():
        heads = x.shape[-2] if x.ndim > 1 else 0
        if heads < 1 or H % heads:
            raise ValueError(f"{op}: the heads of {name} must be a divisor of {of}'s {H}, got {heads} ({name} is {tuple(x.shape)})")
        found[f"H{name}"] = heads
    return found


def dims_of_summary(op: str, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> dict[str, int]:
    """Returns the sizes B, T, H, K, V, Hk and Hv of a summary's arrays, which have no q: H is that of log_decay [B,T,H].

    Raises:
      ValueError: k or v has not the axes [B, T, heads, D], or its heads do not divide H.
    """
    dims = dims_of(op, k, v, "k")
    if log_decay.ndim == 3:
        dims["H"] = log_decay.shape[-1]
    return grouped(op, dims, "log_decay", k=k, v=v)
