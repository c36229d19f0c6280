"""What the mixing matrices of heads say about a task: who gathers, who aggregates, and how sharp their rows are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.data.packing import Row
from hybrid_jax.evaluate.instruments.contract import Progress, Subject
from hybrid_jax.evaluate.instruments.of_heads import OfHeads
from hybrid_jax.evaluate.measurement import Measurement, weighted_mean
from hybrid_jax.evaluate.measures import mesh_batches
from hybrid_jax.layers import mixer_class
from hybrid_jax.layers.mixing import over_blocks
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parallel.sequence import positions_of, zigzag_order
from hybrid_jax.parallel.sharding import axis_size
from hybrid_jax.parameters import Parameters, join_model, split_model

MEASURES = ("gather", "aggregate", "sharpness", "largest share")
ROLES = ("segment_begin", "evidence_begin", "evidence_end")  # arrays of a row, see `add_roles`


@dataclasses.dataclass(frozen=True)
class Mixing(OfHeads):
    """Measures the mixing matrices M of every head (`layers.mixing`) on the rows of a synthetic task.

    Row t of a head is read as shares p[s] = |M[t, s]| / sum_s |M[t, s]| of the tokens s <= t of t's segment: of attention the
    softmax; of a recurrent mixer the sizes of the weights, which may be negative, with which it adds up values. The measures are

    `gather`     the share of the other tokens of a fact in the row of the fact's last token. A fact is the evidence of an answer
                 with the key in front of it (as many tokens as the task's `key_tokens`, else 1): `key value` of a dictionary.
                 The last token's share of itself is left out: a head that reads only its own token gathers nothing.
    `aggregate`  the share of the evidence in the row of the token that predicts an answer: of all tokens of the asked value,
                 the last of which is where a Gather head would have put the fact.
    `sharpness`  1 - H / log n, where H is the entropy of p and n the number of tokens of the segment up to t: 0 for equal shares,
                 1 for a single token. n does not depend on the mixer, so a window is sharper than equal shares of everything.
    `largest share`   of a row. Both are means over the rows of all tokens but the first one of a segment.

    Each is a share from 0 to 1 and a mean over the tokens that it is of; a row of M that is 0 counts as 0. They are measured at
    {"layer": l, "head": h}, as means over the heads of all layers of a mixer at {"mixer": symbol}, and over all heads. Where a
    hybrid of heads keeps head h, {"layer": l, "head": h} and the mean over all heads have the matrix of attention, and the mean of
    the recurrent mixer has its own matrix of that head. The roles
    are those of Gather-and-Aggregate (arXiv 2504.18574, which finds them by removing heads, and says that heads of
    recurrent mixers have smoother rows); the formulas are ours. What a head does to the answer is what `heads` measures.

    Args: see `OfHeads`.
    """

    headline: ClassVar[tuple[str, ...]] = ("sharpness",)

    name: ClassVar[str] = "mixing"

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        super().check(config, corpus, mesh)
        for layer, spec in enumerate(config.layers):
            if not hasattr(mixer_class(spec.kind, config, layer), "mixing"):
                raise ValueError(
                    f"mixing: layer {layer} ({spec.symbol}) has no mixing matrices (see `layers.mixer.Mixer`); measure this model "
                    "without the instrument"
                )

    def rows_on(self, corpus: Corpus, count: int) -> list[Row]:
        """Returns the first rows of the task with the arrays of `ROLES`."""
        task = self.task_on(corpus)
        return [add_roles(task.example(i), getattr(task, "key_tokens", 1)) for i in range(count)]

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        rows = self.rows_on(subject.corpus, self.rows)
        sums = role_sums(subject.model, rows, mesh=subject.mesh, batch_size=self.batch_size, progress=progress)
        counts = np.stack([_counts(row) for row in rows], axis=1)  # [measures, rows]
        means = [np.divide(x, counts[..., None], out=np.zeros_like(x), where=counts[..., None] > 0) for x in sums]
        H = subject.model.config.num_heads
        heads, mixers = [], dict[str, list[np.ndarray]]()  # [measures, rows, heads] of every layer, and by mixer
        for spec, of_layer in zip(subject.model.config.layers, means, strict=True):
            kept, shown = of_layer[:, :, H:], of_layer[:, :, :H].copy()
            shown[:, :, list(spec.attention_heads)] = kept
            heads.append(shown)
            mixers.setdefault(KINDS[spec.kind].symbol, []).append(of_layer[:, :, :H])
            if spec.attention_heads:
                mixers.setdefault(KINDS[ATTENTION].symbol, []).append(kept)

        def of(values: Sequence[np.ndarray], **at: float | int | str) -> list[Measurement | None]:
            """Returns every measure, the mean of values [measures, rows, heads] over the heads."""
            rows = np.concatenate(values, axis=2).mean(axis=2)
            each = zip(MEASURES, rows, counts, strict=True)
            return [weighted_mean(name, mean, count, "share", share=True, **at) for name, mean, count in each]

        measured = of(heads)
        for symbol, values in mixers.items():
            measured += of(values, mixer=symbol)
        for layer, values in enumerate(heads):
            for head in range(H):
                measured += of([values[:, :, head : head + 1]], layer=layer, head=head)
        return [m for m in measured if m is not None]


def add_roles(row: Row, key_tokens: int) -> Row:
    """Returns the row of a task (`data.tasks.contract`) with three arrays more, int32 [T].

    An answer is a run of tokens with one distance, and its evidence the run of tokens so far back.

    Args:
      key_tokens: tokens in front of the evidence that belong to the same fact.

    Returns:
      `segment_begin`: at a fact's last token, the fact's first token, else the token itself. `evidence_begin`, `evidence_end`: at a
      token that predicts one of an answer, the evidence of the answer, the end excluded, else 0.
    """
    distances = row["distances"]
    begins, evidence_begin, evidence_end = np.arange(len(distances)), np.zeros(len(distances)), np.zeros(len(distances))
    answers = np.flatnonzero(distances > 0)
    runs = np.split(answers, np.flatnonzero((np.diff(answers) != 1) | (np.diff(distances[answers]) != 0)) + 1)
    for run in runs if len(answers) else []:
        first, last = run[0] - distances[run[0]], run[-1] - distances[run[-1]]
        begins[last] = max(first - key_tokens, 0)
        evidence_begin[run - 1], evidence_end[run - 1] = first, last + 1
    return {**row, **{n: x.astype(np.int32) for n, x in zip(ROLES, (begins, evidence_begin, evidence_end), strict=True)}}


def role_sums(
    model: Decoder,
    rows: Sequence[Row],
    *,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    progress: Progress = lambda done, total: None,
) -> list[np.ndarray]:
    """Returns the sums of `MEASURES` over the tokens of every row, [measures, rows, heads] of every layer.

    Args:
      rows: with the arrays of `ROLES`.
    """
    (structure, parameters), found = split_model(model), list[list[np.ndarray]]()
    with in_mesh(mesh):
        for batch in mesh_batches(rows, range(len(rows)), batch_size, mesh, more=ROLES):
            found.append([np.asarray(whole_array(x), np.float64) for x in _sums(structure, parameters, batch)])
            progress(min(len(found) * batch_size, len(rows)), len(rows))
    return [np.concatenate(of_layer, axis=1)[:, : len(rows)] for of_layer in zip(*found, strict=True)]


def _counts(row: Row) -> np.ndarray:
    """Returns how many tokens of a row each of `MEASURES` is a mean over."""
    inside = (row["segment_ids"] > 0) & (positions_of(row["segment_ids"][None])[0] > 0)
    gathers = row["segment_begin"] < np.arange(len(inside))
    return np.array([gathers.sum(), (row["evidence_end"] > row["evidence_begin"]).sum(), inside.sum(), inside.sum()], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _sums(structure: Any, parameters: Parameters, batch: Mapping[str, jax.Array]) -> list[jax.Array]:
    """Returns the sums of `MEASURES` over the tokens of every row, [measures, B, H] of every layer."""
    model = join_model(structure, parameters)
    hidden, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])

    def run(layer, x):
        kind = layer.spec.kind
        mixing = layer.mixer(kind).mixing(layer.mixer_input(x), **at)
        sums = jnp.sum(over_blocks(functools.partial(_sums_of_block, batch), mixing), axis=0)
        return layer.run(kind, x, **at)[0].hidden, sums

    return list(model.through_layers(run, hidden)[1])


def _sums_of_block(batch: Mapping[str, jax.Array], begin: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns the sums of `MEASURES` over a block of rows [B, H, rows, T], [measures, B, H]."""
    rows, T = matrices.shape[2:]
    time = jnp.asarray(zigzag_order(T, axis_size("seq")))  # of every token in the batch's order
    places = begin + jnp.arange(rows)

    def of_rows(x: jax.Array) -> jax.Array:
        return jnp.take(x, places, axis=-1, mode="clip")[:, None]  # [B, 1, rows]

    segment_begin, evidence_begin, evidence_end, position, segment = (
        of_rows(batch[name]) for name in (*ROLES, "positions", "segment_ids")
    )
    sizes = jnp.abs(matrices)
    shares = sizes / jnp.maximum(jnp.sum(sizes, axis=-1, keepdims=True), jnp.finfo(sizes.dtype).tiny)

    def between(first: jax.Array, end: jax.Array) -> jax.Array:
        """Returns the share of the tokens first <= s < end, [B, H, rows]; both are [B, 1, rows]."""
        return jnp.sum(jnp.where((time >= first[..., None]) & (time < end[..., None]), shares, 0), axis=-1)

    counted = (segment > 0) & (position > 0) & (places < T)
    entropy = jnp.sum(jax.scipy.special.entr(shares), axis=-1)
    some = jnp.sum(shares, axis=-1) > 0
    sharpness = jnp.where(counted & some, 1 - entropy / jnp.log1p(jnp.maximum(position, 1)), 0)
    largest = jnp.where(counted, jnp.max(shares, axis=-1), 0)
    gather = between(segment_begin, of_rows(jnp.broadcast_to(time, batch["positions"].shape)))
    return jnp.sum(jnp.stack([gather, between(evidence_begin, evidence_end), sharpness, largest]), axis=-1)
