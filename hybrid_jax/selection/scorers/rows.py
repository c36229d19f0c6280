"""What scorers that measure have in common: the rows they read, and a model whose layers hold windows beside attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybrid_jax.checks import check_integer
from hybrid_jax.config import ModelConfig, SWAConfig
from hybrid_jax.data import SELECTION_SEED, Corpus
from hybrid_jax.data.packing import Row
from hybrid_jax.data.tasks import Task
from hybrid_jax.evaluate.measures import BLOCK, PAIRS, batch_size_on, evenly_spaced
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.mesh import check_mesh_fits
from hybrid_jax.parallel.sharding import TOKENS, constrain
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.priming.initialize import initialize_hybrid

RETRIEVAL = "retrieval"


@dataclasses.dataclass(frozen=True)
class OnRows:
    """Options of a scorer that reads rows of training text and of a synthetic task, which no evaluation measures.

    Args:
      rows: rows of the first source's training part, evenly spaced, and as many of the synthetic task.
      seq_len: tokens per row.
      task: the synthetic task, by its name in the config's data; `retrieval` has blocks of 16 pairs, in which no evidence is far.
    """

    rows: int = 16
    seq_len: int = 256
    task: str = RETRIEVAL

    def __post_init__(self):
        for name, minimum in (("rows", 1), ("seq_len", BLOCK)):
            check_integer(f"select.{name}", getattr(self, name), minimum=minimum)

    def check(self, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Raises ValueError if rows are longer than the model's positions, or the mesh does not divide them."""
        if mesh is not None:
            check_mesh_fits(config, mesh, batch_size_on(mesh), self.seq_len)
        if self.seq_len > config.max_position_embeddings:
            raise ValueError(
                f"select.seq_len {self.seq_len:,} is more than the model's max_position_embeddings, "
                f"{config.max_position_embeddings:,}"
            )

    def text_rows(self, corpus: Corpus) -> list[Row]:
        """Returns the rows of text."""
        text = corpus.rows(corpus.first_text, self.seq_len, SELECTION_SEED)
        return [text[i] for i in evenly_spaced(len(text), self.rows)]

    def synthetic(self, corpus: Corpus) -> Task:
        """Returns the synthetic task."""
        blocks: dict[str, Any] = {"min_pairs": PAIRS, "max_pairs": PAIRS} if self.task == RETRIEVAL else {}
        return corpus.task(self.task, self.seq_len, SELECTION_SEED, **blocks)

    def task_rows(self, corpus: Corpus) -> list[Row]:
        """Returns the rows of the synthetic task."""
        task = self.synthetic(corpus)
        return [task[i] for i in range(self.rows)]


def beside_windows(model: Decoder, window: int, mesh: Mesh | None) -> Decoder:
    """Returns a fused model whose layers hold the model's attention and sliding-window attention with the same weights.

    Args:
      model: of attention layers; it is left unchanged.
      window: keys that a query sees in the sliding-window attention, itself included.
      mesh: of the model; None: one device.
    """
    pair = join_model(*split_model(model))  # the caller's model keeps its own window
    pair.config = model.config.with_options(SWAConfig(window))
    return initialize_hybrid(pair, "-".join(["SWA*"] * model.config.num_layers), mesh=mesh)


@functools.partial(jax.jit, static_argnums=(1, 2))
def no_hidden_states(ids: jax.Array, size: int, dtype: Any) -> jax.Array:
    """Returns zeros [B, T, size] for ids [B, T], sharded as hidden states are."""
    return constrain(jnp.zeros((*ids.shape, size), dtype), *TOKENS)
