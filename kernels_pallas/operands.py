"""What all Pallas kernels do with their operands: common dtypes, padding, sums of bf16 parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def output_types(
    op: str, shapes: Sequence[jax.ShapeDtypeStruct], arrays: Sequence[jax.Array], interpreted: bool
) -> list[jax.ShapeDtypeStruct]:
    """Returns the outputs of a Pallas call, varying over the mesh axes that its inputs vary over (see `arguments.alike`).

    Args:
      op: the operation's name, for the message.
      shapes: the outputs, without mesh axes.
      arrays: the inputs.
      interpreted: whether the kernel is interpreted.

    Raises:
      ValueError: the inputs vary over an axis, and the kernel is interpreted: JAX's interpreter does not pass its own loops' check.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    if not varying:
        return list(shapes)
    if interpreted:
        raise ValueError(
            f"{op}: an interpreted Pallas kernel does not run inside jax.shard_map with check_vma; "
            "use implementation='xla', or jax.shard_map(..., check_vma=False)"
        )
    kind = next(jax.typeof(x).manual_axis_type for x in arrays if jax.typeof(x).manual_axis_type.varying == varying)
    return [jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=kind) for s in shapes]


def operand_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns bfloat16 if all arrays are, else float32."""
    return jnp.dtype(jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32)


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Returns x with zeros at the end of an axis, whose size becomes a multiple of `multiple`."""
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, extra)
    return jnp.pad(x, width)


def parts(x: jax.Array, low: DTypeLike, n: int = 2) -> tuple[jax.Array, ...]:
    """Returns x as a sum of up to n arrays of the operands' dtype `low`: x itself, or n bf16 parts (8 bits of mantissa each).

    In an interpreted kernel XLA may skip the rounding, which makes the low parts 0, unless
    `--xla_allow_excess_precision=false` is set.
    """
    if low in (x.dtype, jnp.float32):
        return (x.astype(low),)
    high = x.astype(low)
    return (high,) if n == 1 else (high, *parts(x - high.astype(jnp.float32), low, n - 1))


def dot_parts(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...], dot: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Returns the `dot` of two sums of parts, without the terms smaller than the last part of the longer sum."""
    n = max(len(a), len(b))
    return functools.reduce(jnp.add, [dot(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < n])
