"""The loss of every token of given rows, and whether it was the most likely one, on any mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.data.packing import Row
from hybrid_jax.evaluate.measures import mesh_batches
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parallel.sequence import from_zigzag
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import Parameters, join_model, split_model


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """How a model predicts the tokens of rows; each array is [rows, T], and its place [r, t] is about token t itself.

    Args:
      losses: float32, -log probability of the token given those before it in its segment, in nats.
      right: whether the token was the most likely one.
      weights: `loss_weights` of the rows; tokens of weight 0 (padding, the first of a segment, what cannot be known) do not
        count.
    """

    losses: np.ndarray
    right: np.ndarray
    weights: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _scores(structure: Any, parameters: Parameters, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Returns (losses, right) of a `training_batch`, [B, T] each, in its order of tokens."""
    model = join_model(structure, parameters)
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    best = top_k_tokens(hidden, model.head, 1)[0][..., 0]
    return cross_entropy(hidden, model.head, batch["targets"]), best == batch["targets"]


def token_scores(
    model: Decoder,
    rows: Sequence[Row],
    *,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda done: None,
) -> TokenScores:
    """Returns the scores of all tokens of rows of one length.

    Every process of a job gives the same rows and has the same result; a process computes its devices' part.

    Args:
      model: on the mesh, if there is one.
      mesh: rows are sharded over `data`, `fsdp` and `expert`, their tokens over `seq`. None: one device.
      batch_size: rows at a time; the last batch is padded with rows that do not count.
      progress: called with the number of rows done.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("token_scores needs at least one row")
    structure, parameters = split_model(model)
    seq, losses, right = 1 if mesh is None else mesh.shape["seq"], [], []
    with in_mesh(mesh):
        for batch in mesh_batches(rows, range(len(rows)), batch_size, mesh):
            for scores, part in zip((losses, right), _scores(structure, parameters, batch), strict=True):
                scores.append(from_zigzag(np.asarray(whole_array(part)), seq))
            progress(min(batch_size * len(losses), len(rows)))

    def at_tokens(scores: list[np.ndarray]) -> np.ndarray:
        """Moves the scores from the token that predicts to the token that is predicted."""
        return np.pad(np.concatenate(scores)[: len(rows), :-1], ((0, 0), (1, 0)))

    return TokenScores(at_tokens(losses), at_tokens(right), np.stack([row["loss_weights"] for row in rows]))
