"""The last step of the data pipeline: from rows to the batch that a training step reads, in the mesh's order of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from hybrid_jax.parallel.sequence import positions_of, to_zigzag

TEACHER = ("teacher_ids", "teacher_log_probabilities")
SOURCE = "source"  # a batch's [B,T] numbers of the source that each token comes from, numbered by `pipeline.sources_of`


def training_batch(rows: Mapping[str, np.ndarray], seq_devices: int = 1) -> dict[str, np.ndarray]:
    """Returns the batch that every objective takes.

    Args:
      rows: `input_ids`, `segment_ids` and `loss_weights` (the weight of predicting a token from those before it), each
        [B,T] in order of time. Optional are `source` [B], the number of each row's source, and the arrays named in
        `TEACHER`, [B,T,k].
      seq_devices: size of the mesh axis `seq`; if above 1, the tokens are put in its zig-zag order.

    Returns:
      `input_ids`, `segment_ids`, `positions`, `targets` (the token that follows each one) and `weights` (of predicting it; 0
      at a row's end), each [B,T]. If the rows have them, also `source` [B,T], and the arrays named in `TEACHER` [B,T,k].
    """
    ids, segments, weights = (np.asarray(rows[n]) for n in ("input_ids", "segment_ids", "loss_weights"))
    batch = {
        "input_ids": ids,
        "segment_ids": segments,
        "positions": positions_of(segments),
        "targets": np.pad(ids[:, 1:], ((0, 0), (0, 1))),
        "weights": np.pad(weights[:, 1:], ((0, 0), (0, 1))),
    }
    batch |= {name: rows[name] for name in TEACHER if name in rows}
    if SOURCE in rows:
        batch[SOURCE] = np.broadcast_to(np.asarray(rows[SOURCE], np.int32)[:, None], ids.shape)
    return {name: to_zigzag(x, seq_devices) for name, x in batch.items()}


def abstract_batch(
    rows: int, length: int, sharding: jax.sharding.Sharding | None = None, k: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes [rows, length] of a `training_batch`, with a sharding if one is given.

    Args:
      k: tokens of every cached distribution of a teacher, whose arrays `TEACHER` the batch then has too; 0: it has none.
    """
    dtypes = dict(input_ids="int32", segment_ids="int32", positions="int32", targets="int32", weights="float32")
    found = {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in dtypes.items()}
    cached = dict(zip(TEACHER, ("int32", "float32"), strict=True)) if k else {}
    return found | {name: jax.ShapeDtypeStruct((rows, length, k), dtype, sharding=sharding) for name, dtype in cached.items()}
