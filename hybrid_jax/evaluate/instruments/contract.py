"""The contract of an instrument: something that measures a model and returns numbers with their uncertainty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jax.sharding import Mesh
from tokenizers import Tokenizer

from hybrid_jax.checks import check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measurement import Measurement
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.mesh import check_mesh_fits

Progress = Callable[[int, int], object]
"""Called with (done, total) in the instrument's own units."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
      model: the model, on the mesh if there is one.
      tokenizer, corpus: the model's own tokenizer, and the text of the evaluation by it.
      mesh: None: one device.
    """

    model: Decoder
    tokenizer: Tokenizer
    corpus: Corpus
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Instrument:
    """Measures a model. A subclass is a dataclass whose fields are the instrument's options, all with defaults.

    Attributes:
      headline: the measures that stand in the first table of a report; `MEASURE`, or `MEASURE COORDINATE` for those that are
        measured at coordinates, of which the table shows the first.
    """

    headline: ClassVar[tuple[str, ...]] = ()

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        """Checks the options against a model's config, the evaluation's text and the mesh, before any work.

        Raises:
          ValueError: rows are longer than the model's positions, an unknown source or task, rows that the mesh does not divide, ...
        """

    def stamp(self) -> Any:
        """Returns what a result depends on besides model, text and options, in JSON's types: files that are read, the machine."""
        return None

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        """Returns the numbers, the most important first. Every process of a job calls this and has the same result."""
        raise NotImplementedError


def check_counts(instrument: Instrument, *names: str) -> None:
    """Checks that options are integers of at least 1.

    Raises:
      ValueError: names the option.
    """
    for name in names:
        check_integer(name, getattr(instrument, name), minimum=1)


def check_rows(name: str, config: ModelConfig, mesh: Mesh | None, batch_size: int, seq_len: int) -> None:
    """Checks that batches of rows fit a model and a mesh.

    Raises:
      ValueError: the rows are longer than the model's positions, or the mesh does not divide the batch or the model.
    """
    if mesh is not None:
        try:
            check_mesh_fits(config, mesh, batch_size, seq_len)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    if seq_len > config.max_position_embeddings:
        raise ValueError(
            f"{name}: seq_len {seq_len:,} is more than the model's max_position_embeddings, {config.max_position_embeddings:,}"
        )
