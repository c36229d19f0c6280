"""How evenly the router of every layer with experts loads them, on held-out text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject, check_counts, check_rows
from hybrid_jax.evaluate.measurement import Measurement, exact, weighted_mean
from hybrid_jax.evaluate.measures import evenly_spaced, mesh_batches
from hybrid_jax.layers import MoE
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parameters import Parameters, join_model, split_model


@dataclasses.dataclass(frozen=True)
class ExpertLoad(Instrument):
    """Measures which experts the routers choose for the tokens of held-out text.

    The measure `load` is an expert's choices as a multiple of an even share, tokens * experts_per_token / num_experts, at
    {"expert": e, "layer": l}: 1 everywhere is even, 0 an expert that nobody chose. `busiest` is the largest of them, by layer
    too, and `unused` the share of experts with no choice. A conversion keeps the routers: these numbers say whether a hybrid's
    hidden states still find the source's experts. With experts on several devices, a device's work is the choices of its own ones.

    Args:
      source: the name of one of the evaluation's sources; empty: the first.
      seq_len: tokens per row.
      rows: evenly spaced rows of the source's held-out part; all where there are fewer.
      batch_size: rows at a time.
    """

    headline: ClassVar[tuple[str, ...]] = ("busiest", "unused")

    source: str = ""
    seq_len: int = 1024
    rows: int = 32
    batch_size: int = 8

    def __post_init__(self):
        check_counts(self, "seq_len", "rows", "batch_size")

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        if config.is_fused:
            raise ValueError("experts: a fused model has two streams; measure the stage after it, or the exported model")
        if config.moe is None or all(config.dense_layers):
            raise ValueError("experts: the model has no experts; measure it without the instrument")
        check_rows("experts", config, mesh, self.batch_size, self.seq_len)
        if self.source and self.source not in corpus.held_out:
            raise ValueError(f"experts: no source is named {self.source!r}; have {', '.join(corpus.held_out)}")
        corpus.held_out_rows(self.seq_len, self._source(corpus))

    def _source(self, corpus: Corpus) -> str:
        return self.source or next(iter(corpus.texts), next(iter(corpus.held_out)))

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        packed = subject.corpus.held_out_rows(self.seq_len, self._source(subject.corpus))
        rows = [packed[i] for i in evenly_spaced(len(packed), self.rows)]
        structure, parameters = split_model(subject.model)
        found: list[np.ndarray] = []
        with in_mesh(subject.mesh):
            for batch in mesh_batches(rows, range(len(rows)), self.batch_size, subject.mesh):
                found.append(np.asarray(whole_array(_choices(structure, parameters, batch)), np.float64))
                progress(min(len(found) * self.batch_size, len(rows)), len(rows))
        choices = np.concatenate(found, axis=1)[:, : len(rows)]  # [layers with experts, rows, experts]
        config = subject.model.config
        layers = [layer for layer, dense in enumerate(config.dense_layers) if not dense]
        of_rows = choices[0].sum(axis=1)
        loads = choices.shape[2] * choices / np.maximum(of_rows, 1)[:, None]
        means = choices.shape[2] * choices.sum(axis=1) / max(of_rows.sum(), 1)  # [layers, experts]
        measured: list[Measurement | None] = [
            exact("busiest", float(means.max())),
            exact("unused", float((means == 0).mean()), "share"),
            *(exact("busiest", float(of_layer.max()), layer=layer) for layer, of_layer in zip(layers, means, strict=True)),
        ]
        for layer, of_layer in zip(layers, loads, strict=True):
            for expert in range(choices.shape[2]):
                measured.append(weighted_mean("load", of_layer[:, expert], of_rows, expert=expert, layer=layer))
        return [m for m in measured if m is not None]


@functools.partial(jax.jit, static_argnums=0)
def _choices(structure: Any, parameters: Parameters, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns how many tokens of every row chose each expert, [layers with experts, B, experts]."""
    model = join_model(structure, parameters)
    hidden, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
    inside = (batch["segment_ids"] > 0)[..., None, None]

    def run(layer, x):
        mixed, _ = layer.mixer(layer.spec.kind)(layer.mixer_input(x), **at)
        chosen = None
        if isinstance(layer.mlp, MoE):
            experts = layer.mlp.choices(layer.mlp_input(x, mixed))[1]  # [B, T, k]
            chosen = jnp.sum(inside & (experts[..., None] == jnp.arange(layer.mlp.moe.num_experts)), axis=(1, 2))
        return layer.behind_mixer(x, mixed).hidden, chosen

    return jnp.stack([chosen for chosen in model.through_layers(run, hidden)[1] if chosen is not None])
