"""Layers at even distances, without measuring anything: the baseline that a scorer has to beat.

Layer n's cost is the van der Corput sequence in base 2 (J. G. van der Corput, 1935): the binary digits of n, mirrored at the
point. The cheapest layers are evenly spaced however many are taken, and so are the others:

    n                       0    1    2    3    4    5    6    7
    cost in eighths         0    4    2    6    1    5    3    7
    half is converted      GKA   *   GKA   *   GKA   *   GKA   *
    three quarters are     GKA  GKA  GKA   *   GKA  GKA  GKA   *
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.model import Decoder
from hybrid_jax.selection.scorers.contract import Scores


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Spaces the converted layers evenly.

    At a fraction of 1/2, 1/4, 3/4, ... they alternate exactly with the others, attention last; at other fractions the distances
    between neighbors of either sort differ by a factor of two at most. It has no options, and reads neither model nor text.
    """

    def check(self, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Every model can be scored."""

    def forward_passes(self, config: ModelConfig) -> float:
        """None."""
        return 0.0

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns each layer's place in the sequence, from 0 to 1."""
        return Scores(np.array([_mirrored(n) for n in range(model.config.num_layers)]), "of 1")


def _mirrored(n: int) -> float:
    """Returns the number whose binary digits behind the point are those of n, the last one first."""
    return int(f"{n:b}"[::-1], 2) / 2 ** n.bit_length()
