"""Rows through the experts that they chose: put in groups, multiplied group by group, and put back.

Rows are placed by counting, and moved by gathers in both directions of the gradient. XLA's TPU compiler takes minutes for a sort or
a scatter-add of a hundred thousand rows, and as a scatter it needs a float32 copy of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import backend

BLOCK = 256  # of choices that are counted together; over all of them a cumulative sum needs seven times the memory


class Groups(NamedTuple):
    """Where the choices of n rows with k choices each go, if experts are side by side.

    Args:
      places: [n, k] int32, the place of every choice; choices of other experts come last.
      order: [n * k] int32, the number of the choice that is in every place.
      sizes: [experts] int32, how many choices each expert has.
      own: [n, k] bool, whether the choice is of one of these experts.
    """

    places: jax.Array
    order: jax.Array
    sizes: jax.Array
    own: jax.Array


def group(chosen: jax.Array, experts: int, first: jax.Array | int = 0) -> Groups:
    """Returns the groups of the experts first, ..., first + experts - 1.

    Args:
      chosen: [n, k] int32, the experts of every row. Choices of one expert keep their order.
    """
    choices = chosen.size
    expert = chosen.reshape(-1) - first
    own = (expert >= 0) & (expert < experts)
    expert = jnp.pad(jnp.where(own, expert, experts), (0, -choices % BLOCK), constant_values=-1).reshape(-1, BLOCK, 1)
    is_of = expert == jnp.arange(experts + 1)  # [blocks, BLOCK, experts + 1]
    so_far = jnp.cumsum(is_of.astype(jnp.int32), axis=1)
    counts = so_far[:, -1]
    sizes = jnp.sum(counts, axis=0)
    begin = jnp.cumsum(counts, axis=0) - counts + jnp.cumsum(sizes) - sizes
    places = jnp.sum(jnp.where(is_of, so_far - 1 + begin[:, None], 0), axis=-1).reshape(-1)[:choices]
    order = jnp.zeros(choices, jnp.int32).at[places].set(jnp.arange(choices, dtype=jnp.int32), unique_indices=True)
    return Groups(places.reshape(chosen.shape), order, sizes[:experts], own.reshape(chosen.shape))


@jax.custom_vjp
def to_groups(rows: jax.Array, groups: Groups) -> jax.Array:
    """Returns the rows [n, hidden] once for each choice, in the groups' order, [n * k, hidden].

    In the gradient, what comes back from the places of other experts is not read.
    """
    return rows[groups.order // groups.places.shape[1]]


def _to_groups_forward(rows, groups):
    return to_groups(rows, groups), groups


def _to_groups_backward(groups, d):
    each = jnp.where(groups.own[..., None], d[groups.places], 0)
    return jnp.sum(each, axis=1, dtype=jnp.float32).astype(d.dtype), None


to_groups.defvjp(_to_groups_forward, _to_groups_backward)


@jax.custom_vjp
def from_groups(rows: jax.Array, groups: Groups) -> jax.Array:
    """Returns the rows [n * k, hidden] of the groups by choice, [n, k, hidden]; of choices of other experts they are 0."""
    return jnp.where(groups.own[..., None], rows[groups.places], 0)


def _from_groups_forward(rows, groups):
    return from_groups(rows, groups), groups


def _from_groups_backward(groups, d):
    d = jnp.where(groups.own[..., None], d, 0)
    return d.reshape(-1, d.shape[-1])[groups.order], None


from_groups.defvjp(_from_groups_forward, _from_groups_backward)


@jax.custom_vjp
def grouped_matmul(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns the product of each row with its group's kernel, [rows, out]; rows behind all groups are not defined.

    The gradient of the kernels is `tgmm` of JAX's Megablox on a TPU, where XLA computes it of all rows for every expert.

    Args:
      x: [rows, in], the rows of a group one after the other.
      kernels: [groups, in, out].
      sizes: [groups] int32, the rows of every group.
    """
    return jax.lax.ragged_dot(x, kernels, sizes)


def _grouped_matmul_forward(x, kernels, sizes):
    return grouped_matmul(x, kernels, sizes), (x, kernels, sizes)


def _grouped_matmul_backward(kept, d):
    x, kernels, sizes = kept
    (dx,) = jax.vjp(lambda x: jax.lax.ragged_dot(x, kernels, sizes), x)[1](d)
    if backend() == "tpu":
        return dx, gradient_of_kernels(x, d, sizes).astype(kernels.dtype), None
    (dkernels,) = jax.vjp(lambda kernels: jax.lax.ragged_dot(x, kernels, sizes), kernels)[1](d)
    return dx, dkernels, None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def gradient_of_kernels(x: jax.Array, d: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns x' d of every group, [groups, in, out], of x [rows, in] and d [rows, out]; interpreted where there is no TPU."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows = -len(x) % 128  # behind all groups, so that they are not read
    x, d = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x, d))
    tile = next(size for size in (512, 256, 128) if len(x) % size == 0)
    tiling = (tile, min(1024, x.shape[1]), min(512, d.shape[1]))
    return tgmm(x.T, d, sizes, x.dtype, tiling, interpret=backend() != "tpu")
