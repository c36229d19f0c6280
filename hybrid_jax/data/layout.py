"""The last step of the data pipeline: rows -> what a training step reads, in the mesh's order of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from hybrid_jax.parallel.sequence import positions_of, to_zigzag

TEACHER = ("teacher_ids", "teacher_log_probabilities")
SOURCE = "source"  # of a batch: which source every token comes from, by `pipeline.sources_of`


def training_batch(rows: Mapping[str, np.ndarray], seq_devices: int = 1) -> dict[str, np.ndarray]:
    """What every objective takes.

    Args:
      rows: `input_ids`, `segment_ids` [B,T] and `loss_weights` [B,T], the weight of predicting a token from those
        before it; in order of time. With `source` [B], the number of each row's source, the batch has it too.
      seq_devices: size of the mesh axis `seq`; above 1 the tokens come in its zig-zag order.

    Returns:
      [B,T] each: `input_ids`, `segment_ids`, `positions`, and for the token that follows each one `targets` and
      `weights` (0 at a row's end); where the rows have them, `SOURCE` [B,T], and as they are `TEACHER`'s [B,T,k].
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


def abstract_batch(rows: int, length: int, sharding=None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a `training_batch`."""
    dtypes = dict(input_ids="int32", segment_ids="int32", positions="int32", targets="int32", weights="float32")
    return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in dtypes.items()}
