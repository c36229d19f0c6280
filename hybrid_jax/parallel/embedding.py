"""Token embeddings from a table that is sharded over the mesh: token ids are sent, not the table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.sharding import TOKENS, mesh_axes_of, shard_map_by_axes


def lookup(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """table[ids] in `dtype`; the table's gradient is summed in the table's own.

    Every device looks up its columns (and its rows, where `tensor` shards the vocabulary) for the tokens of all devices among
    which the columns are sharded, and they exchange: as many bytes as the tokens' own hidden states.

    Args:
      table: [vocab, hidden].
      ids: [B, T].

    Returns:
      [B, T, hidden].
    """
    columns, rows = mesh_axes_of("embed"), mesh_axes_of("vocab")

    def local(table, ids):
        if columns:
            ids = jax.lax.all_gather(ids, columns)
        if not rows:
            found = jnp.take(table, ids, axis=0, mode="clip").astype(dtype)
        else:
            here = ids - jax.lax.axis_index(rows) * len(table)
            inside = (here >= 0) & (here < len(table))
            found = jnp.take(table, here, axis=0, mode="clip")
            found = jnp.where(inside[..., None], found, 0).astype(dtype)
            found = jax.lax.psum(found, rows)
        if columns:
            found = jax.lax.all_to_all(found, columns, split_axis=0, concat_axis=found.ndim - 1, tiled=True)[0]
        return found

    return shard_map_by_axes(local, (table, ids), (("vocab", "embed"), TOKENS), TOKENS)
