"""What the TPU kernels of a chunk share: products, transposes, the decays, reading and writing the blocks of a grid step.

Each stage of a kernel is done for all heads before the next stage begins (`each`): the matmuls of one head
wait for one another, those of several heads fill the matrix units.

The tokens are in lanes: the vectors of a head are the columns of an array [D,C]. A number per token is then a row [1,C],
which multiplies all vectors as it is, and the sum over a vector adds registers. With the tokens in rows, both would use the
unit that moves data between lanes, and wait for it: it is slow. Here it has the transposes of what comes and goes in rows,
and the sums over the tokens that read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import operands
from kernels_pallas.arguments import backend
from kernels_pallas.mosaic import row_count

Contraction = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]  # as `dot_general`'s
NN: Contraction = (((1,), (0,)), ((), ()))  # a b
NT: Contraction = (((1,), (1,)), ((), ()))  # a b'
TN: Contraction = (((0,), (0,)), ((), ()))  # a' b


def each(f: Callable[..., Any], *heads: Sequence) -> list:
    """Returns [f(*arguments of head 0), f(*arguments of head 1), ...]: one stage of a kernel, for every head."""
    return [f(*args) for args in zip(*heads, strict=True)]


def head_slices(ref: jax.Ref, heads: int, group: int = 1) -> list[jax.Array]:
    """Reads a block [1, C, heads/group*D] as `heads` arrays [C, D], of which `group` neighbours are the same."""
    D = ref.shape[2] * group // heads
    slices = [ref[0, :, h * D : (h + 1) * D] for h in range(heads // group)]
    return [slices[h // group] for h in range(heads)]


def head_columns(ref: jax.Ref, heads: int, group: int = 1) -> list[jax.Array]:
    """Returns what `head_slices` does with the tokens in lanes, [D, C]."""
    columns = each(jnp.transpose, head_slices(ref, heads // group))
    return [columns[h // group] for h in range(heads)]


def store_heads(ref: jax.Ref, values: Sequence[jax.Array], scale: float) -> None:
    """Writes scale times one array [C, D] per head into a block [1, C, heads*D]."""
    D = values[0].shape[1]
    for h, value in enumerate(values):
        ref[0, :, h * D : (h + 1) * D] = (scale * value).astype(ref.dtype)


def store_tokens(ref: jax.Ref, values: Sequence[jax.Array], scale: float = 1.0, group: int = 1) -> None:
    """Writes scale times the sums of `group` neighbours of one array [D, C] per head into a block [1, C, heads/group*D]."""
    D = values[0].shape[0]
    for h in range(len(values) // group):
        value = functools.reduce(jnp.add, values[h * group : (h + 1) * group])
        value = (value if scale == 1.0 else scale * value).astype(ref.dtype)
        ref[0, :, h * D : (h + 1) * D] = value.T


def stack_rows(rows: Sequence[jax.Array], n: int) -> jax.Array:
    """Returns [n, C] whose first rows are `rows`, each [1, C]; the others are 0."""
    rest = [jnp.zeros((n - len(rows), rows[0].shape[1]), jnp.float32)] if n > len(rows) else []
    return jnp.concatenate([*rows, *rest], axis=0)


def as_columns(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns rows [1, C] as columns [C, 1]."""
    cols = stack_rows(rows, row_count(len(rows))).T
    return [cols[:, i : i + 1] for i in range(len(rows))]


def as_rows(columns: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns columns [C, 1] as rows [1, C]."""
    C = columns[0].shape[0]
    lane = iota((C, row_count(len(columns))), 1)
    table = functools.reduce(lambda t, c: jnp.where(lane == c[0], c[1], t), enumerate(columns), jnp.zeros(lane.shape, jnp.float32))
    rows = table.T
    return [rows[i : i + 1] for i in range(len(columns))]


def store_rows(ref: jax.Ref, rows: Sequence[jax.Array], scale: float = 1.0) -> None:
    """Writes scale times rows, each [1, C], into a block [1, 1, 1, R, C]; the others are 0."""
    ref[0, 0, 0] = scale * stack_rows(rows, ref.shape[3])


def dot(a: jax.Array, b: jax.Array, dims: Contraction = NN) -> jax.Array:
    """Returns a product accumulated in float32: of bf16 operands in one pass, of others at full float32 precision.

    Interpreted, bf16 operands are multiplied as float32, which is exact too: XLA has no such product of transposed ones on a CPU.
    """
    if a.dtype == b.dtype == jnp.bfloat16 and backend() == "tpu":
        precision = jax.lax.Precision.DEFAULT
    else:
        precision, a, b = jax.lax.Precision.HIGHEST, a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def dot_parts(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...], dims: Contraction = NN) -> jax.Array:
    """Returns `operands.dot_parts` of two sums of parts, with `dot`."""
    return operands.dot_parts(a, b, functools.partial(dot, dims=dims))


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns int32 of a shape that count along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def row_sum(x: jax.Array) -> jax.Array:
    """Returns the sums of the rows of [C, D], [C, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


def column_sum(x: jax.Array) -> jax.Array:
    """Returns the sums of the columns of [C, D], [1, D]."""
    return jnp.sum(x, axis=0, keepdims=True)


def earlier(pairs: jax.Array, together: int = 1) -> jax.Array:
    """Returns [C,C] at [i,t] where token i is of an earlier step than t, steps of `together` tokens; 0 elsewhere.

    What a step has of itself does not decay, and would cancel.
    """
    source, reader = iota(pairs.shape, 0), iota(pairs.shape, 1)
    if together > 1:
        source, reader = source // together, reader // together
    return jnp.where(source < reader, pairs, 0.0)


def sums_of_rows(pairs: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the sums of the rows of every head's [C,C], as rows [1,C]."""
    return as_rows(each(row_sum, pairs))


class Decay(NamedTuple):
    """One head's decays in a chunk (see `chunks.py`), the tokens that read in lanes.

    Attributes:
      mask: [C,C], at [i,t] what token t has of token i.
      reach, keep: [1,C].
      total: [1,1].
    """

    mask: jax.Array
    reach: jax.Array
    keep: jax.Array
    total: jax.Array


def decays(rows: jax.Array, heads: int, segments: int | None) -> list[Decay]:
    """Returns every head's decays, from a block [R, C] of `mosaic.chunk_rows`.

    Args:
      segments: index of the row with each token's segment (the next row has the segment carried in), or None.
    """
    C = rows.shape[1]
    cols = rows.T
    end = slice(C - 1, C)
    where = iota((C, C), 0) <= iota((C, C), 1)
    sees_start = survives = through = None
    if segments is not None:
        seg_row, seg_col = rows[segments : segments + 1], cols[:, segments : segments + 1]
        carried = rows[segments + 1 : segments + 2, :1]
        where &= seg_col == seg_row
        sees_start, survives, through = seg_row == carried, seg_row == seg_row[:, end], seg_row[:, end] == carried

    def masked_exp(x, where):  # masked before exp: no overflow
        return jnp.exp(x) if where is None else jnp.where(where, jnp.exp(jnp.where(where, x, 0.0)), 0.0)

    def decay(head):
        c, f = slice(2 * head, 2 * head + 1), slice(2 * head + 1, 2 * head + 2)
        return Decay(
            mask=masked_exp((rows[c] - cols[:, c]) + (rows[f] - cols[:, f]), where),
            reach=masked_exp(rows[c] + rows[f], sees_start),
            keep=masked_exp((rows[c, end] - rows[c]) + (rows[f, end] - rows[f]), survives),
            total=masked_exp(rows[c, end] + rows[f, end], through),
        )

    return [decay(h) for h in range(heads)]


def chunk_scalars(rows: jax.Ref, heads: int, packed: bool, further: int = 0) -> tuple[list[Decay], list[jax.Array]]:
    """Reads a block of `mosaic.chunk_rows`: every head's decays, and `further` more scalars, each of all heads, as rows [1,C]."""
    table = rows[0, 0, 0]
    first, end = 2 * heads, (2 + further) * heads
    return decays(table, heads, end if packed else None), [table[n : n + 1] for n in range(first, end)]
