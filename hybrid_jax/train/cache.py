"""Writes what a teacher thinks of every token of a phase, to distil from without running it again."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.data import Corpus, training_batches
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.model import Decoder
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.train.metrics import progress_bar
from hybrid_jax.train.phase import Phase

TILE = 2048  # tokens whose logits exist at a time


def cache_teacher(
    model: Decoder, phase: Phase, corpus: Corpus, mix: Mapping[str, float], *, seed: int, out: pathlib.Path, k: int
) -> TeacherCache:
    """The k likeliest tokens after every token of every step of `phase`; goes on where it was.

    Args:
      model: the teacher; the phase's `compute_dtype` is used.
      mix, seed: of the phase that will distil.

    Raises:
      ValueError: `out` holds a cache of other rows, or k is more than the vocabulary.
    """
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"k must lie in 1 ... {model.config.vocab_size}, the vocabulary, got {k}")
    rows = dict(batch_size=phase.batch_size, length=phase.seq_len, seed=seed, answer_weight=phase.answer_weight)
    cache = TeacherCache(out, k, mix=mix, **rows)
    model.compute_dtype = jnp.dtype(phase.compute_dtype)
    structure, parameters = split_model(model)

    @jax.jit
    def likeliest(parameters, batch):
        model = join_model(structure, parameters)
        hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])

        def row(hidden):
            return jax.lax.top_k(jax.nn.log_softmax(model.head(hidden).astype(jnp.float32)), k)

        flat = hidden.reshape(-1, hidden.shape[-1])
        values, ids = jax.lax.map(row, flat, batch_size=min(TILE, len(flat)))
        return ids.reshape(*hidden.shape[:2], k), values.reshape(*hidden.shape[:2], k)

    missing = list(cache.missing(phase.steps))
    stream = training_batches(corpus, mix, **rows)
    step = 0
    with progress_bar("cache-teacher", phase.steps, phase.steps - len(missing)) as bar:
        for wanted in missing:
            while step <= wanted:
                batch = next(stream)
                step += 1
            cache.write(wanted, *map(np.asarray, likeliest(parameters, training_batch(batch))))
            bar.update()
    return cache
