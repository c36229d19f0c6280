"""Rows of many sources, mixed and batched by grain, each process reading its own.

The global order of rows depends on the seed and the step alone, not on processes or devices, so a run goes on with the
same rows on another mesh. The iterator's state (in the checkpoint) counts steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from hybrid_jax.data.corpus import Corpus
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.parallel.distributed import say


@dataclasses.dataclass(frozen=True)
class _Own:
    """Of a dataset in batches of `batch_size`, some rows of every batch."""

    dataset: grain.MapDataset
    batch_size: int
    rows: Sequence[int]

    def __len__(self):
        return len(self.dataset) // self.batch_size * len(self.rows)

    def __getitem__(self, i):
        step, n = divmod(i, len(self.rows))
        return self.dataset[step * self.batch_size + self.rows[n]]


def sources_of(mix: Mapping[str, float]) -> tuple[str, ...]:
    """The sources that give rows; a batch's `source` numbers them in this order.

    Raises:
      ValueError: no positive share, or a negative one.
    """
    found = {name: share for name, share in sorted(mix.items()) if share}
    if not found or min(found.values()) < 0:
        raise ValueError(f"data.mix needs at least one positive share and no negative one, got {dict(mix)}")
    return tuple(found)


def _numbered(source, number: int, seed: int) -> grain.MapDataset:
    """The rows of a source in random order, again and again, each with the source's number."""
    rows = grain.MapDataset.source(source).shuffle(seed=seed + number).repeat()
    return rows.map(lambda row: {**row, "source": np.int32(number)})


def _repeated(available: Mapping[str, int], mix: Mapping[str, float], taken: int) -> list[str]:
    """Of sources of so many rows each, a sentence for every one of which `taken` rows of the mix are more than it has."""
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
):
    """An endless, checkpointable iterator of batches {input_ids, segment_ids, loss_weights} [rows, length], {source} [rows].

    Args:
      mix: source name -> share of the rows; shares need not sum to one, zeros are left out.
      batch_size: rows of a step, of all processes together.
      answer_weight: weight of the answers of synthetic rows.
      rows: those of a step that this process wants; None: all.
      threads: that read ahead.
      teacher_cache: adds what a teacher thinks of each token, see `teacher_cache.TeacherCache`.
      steps: that will be taken of it; a source that has fewer rows than they take is named, and how often it is repeated.

    Raises:
      ValueError: an unknown source, no positive share, or a teacher's cache of other rows.
    """
    names = sources_of(mix)
    sources = [corpus.rows(name, length, seed, answer_weight) for name in names]
    unused = [f"{name}: {s.unused}" for name, s in zip(names, sources, strict=True) if getattr(s, "unused", "")]
    for note in (*_repeated(dict(zip(names, map(len, sources), strict=True)), mix, steps * batch_size), *unused):
        say(note)
    mixed = grain.MapDataset.mix([_numbered(s, n, seed) for n, s in enumerate(sources)], weights=[mix[name] for name in names])
    rows = tuple(range(batch_size) if rows is None else rows)
    batches = grain.MapDataset.source(_Own(mixed, batch_size, rows)).batch(len(rows), drop_remainder=True)
    if teacher_cache:
        described = dict(batch_size=batch_size, length=length, seed=seed, mix=mix, answer_weight=answer_weight)
        cache = TeacherCache(teacher_cache, made_of=corpus.identity(mix), **described)
        batches = batches.map_with_index(lambda step, batch: {**batch, **cache.read(step, rows)})
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, 2 * threads))))
