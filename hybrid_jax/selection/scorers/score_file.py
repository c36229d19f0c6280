"""Scores that were measured elsewhere, from a CSV file in hybrid-model-factory's format.

    layer_num,cite,icl,rag
    -1,61.5,74.0,55.2
    0,60.9,73.1,54.8
    ...

Row -1 is the untouched model. Row n is the model whose layer n has sliding-window attention in place of attention (arXiv
2605.08301, section 3.1: window 2048, HELMET's long-context tasks). A layer's cost is the fall of the tasks' mean score.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.model import Decoder
from hybrid_jax.selection.scorers.contract import Scores

UNTOUCHED = -1  # layer_num of the model as it is


@dataclasses.dataclass(frozen=True)
class ScoreFile:
    """Reads scores from a file.

    Args:
      path: the CSV file: a column `layer_num` and one column per task, higher is better.
    """

    path: str = ""

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"select.path must name the CSV file with the scores, got {self.path!r}")

    def check(self, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Raises ValueError or FileNotFoundError unless the file has a row for each of the model's layers."""
        self._costs(config.num_layers)

    def forward_passes(self, config: ModelConfig) -> float:
        """None: they were made elsewhere."""
        return 0.0

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns the costs of the model's layers; nothing is evaluated."""
        return Scores(self._costs(model.config.num_layers), "points")

    def _costs(self, num_layers: int) -> np.ndarray:
        path = pathlib.Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"select.path {self.path}: there is no such file")
        means: dict[int, float] = {}
        with path.open(newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header[:1] != ["layer_num"] or len(header) < 2:
                raise ValueError(f"select.path {self.path}: the first line must be 'layer_num,TASK,...', got {','.join(header)!r}")
            for row in filter(None, rows):
                try:
                    layer, scores = int(row[0]), [float(x) for x in row[1:]]
                except ValueError as e:
                    raise ValueError(f"select.path {self.path}, line {rows.line_num}: {e}") from None
                if len(row) != len(header) or layer in means:
                    what = f"layer {layer} twice" if layer in means else f"{len(row)} columns, the header has {len(header)}"
                    raise ValueError(f"select.path {self.path}, line {rows.line_num} has {what}")
                means[layer] = float(np.mean(scores))
        wanted = [UNTOUCHED, *range(num_layers)]
        if missing := [layer for layer in wanted if layer not in means]:
            raise ValueError(f"select.path {self.path} has no row for layer_num {missing[0]}; the model has {num_layers} layers")
        if beyond := sorted(means.keys() - set(wanted)):
            raise ValueError(f"select.path {self.path} has a row for layer_num {beyond[0]}; the model has {num_layers} layers")
        return means[UNTOUCHED] - np.array([means[layer] for layer in range(num_layers)])
