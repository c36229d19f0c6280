"""Rows of many sources, mixed and batched by grain, each process reading its own.

The global order of rows depends on the seed and the step alone, not on processes or devices, so a run continues with the
same rows on another mesh. The iterator's state, which is part of the checkpoint, counts steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from hybrid_jax.data.corpus import Corpus
from hybrid_jax.data.packing import PAIRS, PackedRows, Rows
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.parallel.distributed import say


@dataclasses.dataclass(frozen=True)
class _OwnRows:
    """The rows of each global batch that this process reads: `rows` of every `batch_size` of the dataset."""

    dataset: grain.MapDataset
    batch_size: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> Any:
        step, n = divmod(index, len(self.rows))
        return self.dataset[step * self.batch_size + self.rows[n]]


def sources_of(mix: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the names of the sources with a share in the mix; a batch's `source` numbers them in this order.

    Raises:
      ValueError: no share is positive, or one is negative.
    """
    found = {name: share for name, share in sorted(mix.items()) if share}
    if not found or min(found.values()) < 0:
        raise ValueError(f"data.mix needs at least one positive share and no negative one, got {dict(mix)}")
    return tuple(found)


def _check_pairs(sources: Mapping[str, Rows], pairs: bool) -> None:
    """Checks that all of the sources have preference pairs, or that none has.

    Raises:
      ValueError: one does not, or has; names it.
    """
    for name, rows in sources.items():
        has_pairs = isinstance(rows, PackedRows) and rows.packing == PAIRS
        if pairs and not has_pairs:
            raise ValueError(
                f"{name} has no preference pairs, which this phase learns from: give records of 'prompt', 'chosen' and 'rejected'"
            )
        if has_pairs and not pairs:
            raise ValueError(f"{name} has preference pairs, so its rejected answers would be learned; take the objective 'dpo'")


def _numbered(source: Rows, number: int, seed: int) -> grain.MapDataset:
    """Returns the rows of a source in random order, repeated without end, each with the source's number."""
    rows = grain.MapDataset.source(source).shuffle(seed=seed + number).repeat()
    return rows.map(lambda row: {**row, "source": np.int32(number)})


def _repeated(available: Mapping[str, int], mix: Mapping[str, float], taken: int) -> list[str]:
    """Returns a sentence for every source that has fewer rows than `taken` rows of the mix take from it.

    Args:
      available: how many rows each source has.
    """
    total = sum(mix[name] for name in available)
    wanted = {name: taken * mix[name] / total for name in available}
    return [
        f"{name}: {rows:,} rows for the {wanted[name]:,.0f} that this phase takes, so each is seen {wanted[name] / rows:.1f} times"
        for name, rows in available.items()
        if wanted[name] >= rows + 0.5
    ]


def training_batches(
    corpus: Corpus,
    mix: Mapping[str, float],
    *,
    batch_size: int,
    length: int,
    seed: int,
    answer_weight: float = 1.0,
    rows: Sequence[int] | None = None,
    threads: int = 1,
    teacher_cache: str = "",
    steps: int = 0,
    pairs: bool = False,
) -> grain.DatasetIterator:
    """Returns an endless, checkpointable iterator of batches.

    A batch has `input_ids`, `segment_ids` and `loss_weights` [rows, length], and `source` [rows].

    Args:
      corpus: the sources.
      mix: source name -> share of the rows; shares need not sum to one, sources with share 0 are left out.
      batch_size: rows per step, of all processes together.
      length: tokens per row.
      seed: decides the order of the rows, and the rows of synthetic tasks.
      answer_weight: weight of the answers of synthetic rows in the loss.
      rows: which of a step's rows this process reads; default: all.
      threads: number of threads that read ahead.
      teacher_cache: directory of a `TeacherCache`, whose top-k tokens are added to the batches; empty: none.
      steps: how many steps will be taken; a source with fewer rows than they take is reported. 0: unknown.
      pairs: whether the rows are to be of preference pairs (see `packing`), or of documents.

    Raises:
      ValueError: an unknown source, no positive share, a source of pairs among others, or a teacher's cache of other rows.
    """
    names = sources_of(mix)
    sources = [corpus.rows(name, length, seed, answer_weight) for name in names]
    _check_pairs(dict(zip(names, sources, strict=True)), pairs)
    unused = [f"{name}: {s.unused}" for name, s in zip(names, sources, strict=True) if s.unused]
    for note in (*_repeated(dict(zip(names, map(len, sources), strict=True)), mix, steps * batch_size), *unused):
        say(note)
    mixed = grain.MapDataset.mix([_numbered(s, n, seed) for n, s in enumerate(sources)], weights=[mix[name] for name in names])
    own = tuple(range(batch_size) if rows is None else rows)
    batches = grain.MapDataset.source(_OwnRows(mixed, batch_size, own)).batch(len(own), drop_remainder=True)
    if teacher_cache:
        described: dict[str, Any] = dict(batch_size=batch_size, length=length, seed=seed, answer_weight=answer_weight)
        cache = TeacherCache(teacher_cache, mix=mix, made_of=corpus.identity(mix), **described)
        batches = batches.map_with_index(lambda step, batch: {**batch, **cache.read(step, own)})
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, 2 * threads))))
