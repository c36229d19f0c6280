"""Rows that are measured, their batches on a mesh, and the sums of a batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.data import HELD_OUT_SEED, Corpus
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.packing import Row, Rows
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.mesh import divided_rows
from hybrid_jax.parallel.placement import own_rows, to_mesh
from hybrid_jax.parallel.sequence import to_zigzag
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import Parameters, join_model

BATCH = 8  # rows that are evaluated at a time
PAIRS = 16  # pairs in a block of retrieval
BLOCK = 4 * PAIRS + 2  # tokens of such a block
ARRAYS = ("input_ids", "segment_ids", "loss_weights")  # of a row


@functools.partial(jax.jit, static_argnums=0)
def batch_sums(structure: Any, parameters: Parameters, batch: Mapping[str, Any]) -> jax.Array:
    """Returns [sum of weight * loss, sum of weight * (the most likely token is right), sum of weight] of a `training_batch`."""
    model = join_model(structure, parameters)
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    weights = batch["weights"]
    losses = cross_entropy(hidden, model.head, batch["targets"])
    right = top_k_tokens(hidden, model.head, 1)[0][..., 0] == batch["targets"]
    return jnp.stack([jnp.sum(losses * weights), jnp.sum(right * weights), jnp.sum(weights)])


def mesh_batches(
    rows: Rows | Sequence[Row], indices: Sequence[int], batch_size: int, mesh: Mesh | None, more: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields training batches of `batch_size` of the rows, in that order; the last one is filled with rows of weight 0.

    Args:
      rows: a process reads only the rows of which its devices hold a part.
      indices: the numbers of the rows; at least one.
      mesh: every device gets its rows and tokens. None: one device.
      more: names of further arrays of a row, [T] each, that the batches have too.
    """
    seq, mine, like = 1 if mesh is None else mesh.shape["seq"], own_rows(mesh, batch_size), rows[indices[0]]
    names = (*ARRAYS, *more)
    for begin in range(0, len(indices), batch_size):
        places = [begin + row for row in mine]
        found = [rows[indices[place]] if place < len(indices) else None for place in places]
        own = {name: np.stack([np.zeros_like(like[name]) if row is None else row[name] for row in found]) for name in names}
        batch = training_batch(own, seq) | {name: to_zigzag(own[name], seq) for name in more}
        yield to_mesh(mesh, batch, batch_size, mine)


def batch_size_on(mesh: Mesh | None, rows: int = BATCH) -> int:
    """Returns how many of so many rows are evaluated at a time: at most `BATCH`, or the next number that the mesh divides."""
    return divided_rows(mesh, min(BATCH, rows))


def padded_batches(rows: Sequence[Row], mesh: Mesh | None = None) -> list[dict[str, Any]]:
    """Returns batches of `batch_size_on` the mesh of the rows, see `mesh_batches`."""
    return list(mesh_batches(rows, range(len(rows)), batch_size_on(mesh, len(rows)), mesh))


def held_out_rows(corpus: Corpus, seq_len: int, rows: int) -> list[Row]:
    """Returns evenly spaced rows of the held-out text: `rows`, or all where there are fewer."""
    held_out = corpus.held_out_rows(seq_len)
    return [held_out[i] for i in evenly_spaced(len(held_out), rows)]


def retrieval_rows(corpus: Corpus, seq_len: int, rows: int, pairs: int = PAIRS, seed: int = HELD_OUT_SEED) -> list[Row]:
    """Returns rows of key-value retrieval that training does not see, in blocks of exactly `pairs` pairs."""
    task = corpus.task("retrieval", seq_len, seed, min_pairs=pairs, max_pairs=pairs)
    return [task[i] for i in range(rows)]


def evenly_spaced(available: int, rows: int) -> list[int]:
    """Returns the numbers of at most `rows` of the available rows."""
    return np.unique(np.linspace(0, available - 1, min(rows, available)).astype(int)).tolist()
