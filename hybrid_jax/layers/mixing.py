"""Mixing matrices: how much of the value of token s each head's output at token t has.

    o_h[t] = sum_s M_h[t, s] v_h[s],    M_h[t, s] = 0 where s is after t or of another segment

For attention M is the softmax. The recurrent mixers are linear in their values and treat every channel of a value alike, so the
operation itself is M: row t is what its transpose makes of the unit vector of token t, and the channels of one call are the rows
of a block. Rows of all tokens cost one transposed pass of the operation per block, and nothing of a mixer's formula is written a
second time. Everything is a differentiable function of the mixer's parameters, in float32.

The matrix orientation of MOHAWK (arXiv 2408.10189) compares these matrices; arXiv 2504.18574 reads the roles of heads from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.attention_block import soft_capped

ROWS = 128  # of a block

Rows = Callable[[jax.Array], jax.Array]
"""(number of the first row, []) -> the rows of a block [B, H, rows, T] float32; those behind the last token are 0."""


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The mixing matrices of one layer's heads on given inputs.

    Args:
      values: v [B, T, H, V], of every query head, as the head's matrix multiplies them: projected, behind the short conv and its
        activation, in front of gates, which are part of the matrix.
      rows: (rows of a block) -> a function that makes any block of so many rows.
    """

    values: jax.Array
    rows: Callable[[int], Rows]

    def matrix(self) -> jax.Array:
        """Returns M [B, H, T, T] float32 at once: for short rows. `over_blocks` is for long ones."""
        return self.rows(self.values.shape[1])(jnp.int32(0))


def over_blocks(function: Callable[..., Any], *mixings: Mixing, rows: int = ROWS) -> Any:
    """Returns what function(number of the first row, *blocks of rows) makes of every block, stacked.

    One block of each matrix is in memory at a time, in the gradient too, where it is computed once more.

    Args:
      mixings: of layers on the same tokens, a teacher's and a student's for example.
      rows: of a block; the last one has rows of 0 behind the last token.

    Returns:
      A pytree of [ceil(T / rows), ...].
    """
    T = mixings[0].values.shape[1]
    blocks = [mixing.rows(min(rows, T)) for mixing in mixings]

    def one(begin: jax.Array) -> Any:
        return function(begin, *(block(begin) for block in blocks))

    return jax.lax.map(jax.checkpoint(one), jnp.arange(0, T, min(rows, T)))


def side_by_side(*mixings: Mixing) -> Mixing:
    """Returns the matrices of mixers on the same tokens, the first one's heads first; their values are equally wide."""

    def block(rows: int) -> Rows:
        blocks = [mixing.rows(rows) for mixing in mixings]
        return lambda begin: jnp.concatenate([block(begin) for block in blocks], axis=1)

    return Mixing(jnp.concatenate([mixing.values for mixing in mixings], axis=2), block)


def of_operation(
    operation: Callable[[jax.Array], jax.Array],
    values: jax.Array,
    *,
    weight: jax.Array | None = None,
    skip: jax.Array | None = None,
) -> Mixing:
    """Returns the matrices of a recurrent mixer, o = operation(weight v) + skip v.

    Args:
      operation: [B, T, H, C] -> [B, T, H, C] float32 for any C, linear, the same for every channel.
      values: v [B, T, H, V].
      weight: [B, T, H], what a value is multiplied with in front of the operation; None: 1.
      skip: [H]; None: 0.
    """
    B, T, H, _ = values.shape

    def block(rows: int) -> Rows:
        _, transposed = jax.vjp(operation, jnp.zeros((B, T, H, rows), jnp.float32))

        def make(begin: jax.Array) -> jax.Array:
            unit = (jnp.arange(T)[:, None] == begin + jnp.arange(rows)).astype(jnp.float32)[:, None]  # [T, 1, rows]
            (m,) = transposed(jnp.broadcast_to(unit, (B, T, H, rows)))
            m = m if weight is None else m * weight[..., None]
            m = m if skip is None else m + skip[:, None] * unit
            return jnp.moveaxis(m, 1, 3)

        return make

    return Mixing(values, block)


def of_softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    mask: Callable[[jax.Array, jax.Array], jax.Array],
    soft_cap: float | None = None,
) -> Mixing:
    """Returns the matrices of attention.

    Args:
      q: [B, T, H, D], normed and rotated.
      k, v: [B, T, Hkv, D].
      positions, segment_ids: [B, T].
      mask: (positions, segments of some queries [B, Q]) -> [B, Q, T], the keys that they see.
      soft_cap: of the scores; None: there is none.
    """
    B, T, H, D = q.shape
    groups = H // k.shape[2]
    k32 = k.astype(jnp.float32)

    def block(rows: int) -> Rows:
        def make(begin: jax.Array) -> jax.Array:
            at = begin + jnp.arange(rows)
            queries, where, segments = (jnp.take(x, at, axis=1, mode="clip") for x in (q, positions, segment_ids))
            queries = queries.astype(jnp.float32).reshape(B, rows, -1, groups, D)
            scores = jnp.einsum("bthgd,bshd->bhgts", queries, k32, precision="highest") * D**-0.5
            scores = soft_capped(scores, soft_cap)
            seen = (mask(where, segments) & (at < T)[:, None])[:, None, None]
            shares = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
            return jnp.where(seen, shares, 0).reshape(B, H, rows, T)

        return make

    return Mixing(jnp.repeat(v, groups, axis=2), block)
