"""Writes what a teacher thinks of every token of a phase, to distil from without running it again."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.data import Corpus, training_batches
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import barrier, is_first, whole_array
from hybrid_jax.parallel.mesh import check_mesh_fits
from hybrid_jax.parallel.placement import in_mesh, own_rows, to_mesh
from hybrid_jax.parallel.sequence import from_zigzag
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import split_model
from hybrid_jax.train.metrics import progress_bar
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.teacher import cached_teacher


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """[2] uint32 of an array's bits and where they are; integers, so that it does not depend on how `x` is sharded."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]

    def mixed(factor):
        found = (bits ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(factor)
        return jnp.sum((found ^ (found >> 15)) * jnp.uint32(0x2C1B3C6D), dtype=jnp.uint32)

    return jnp.stack([mixed(0x85EBCA6B), mixed(0xC2B2AE35)])


def teacher_fingerprint(model: Decoder) -> str:
    """The same for the same configuration and weights, on every mesh; every process of a job calls it."""
    found = hashlib.sha256(repr(dataclasses.replace(model.config, extra={})).encode())
    for name, x in sorted(split_model(model)[1].items()):
        found.update(f"{name} {x.shape} {x.dtype} {whole_array(_checksum(x)).tolist()}".encode())
    return found.hexdigest()


def cache_teacher(
    model: Decoder,
    phase: Phase,
    corpus: Corpus,
    mix: Mapping[str, float],
    *,
    seed: int,
    out: pathlib.Path,
    k: int,
    mesh: Mesh | None = None,
) -> TeacherCache:
    """The k top-k tokens after every token of every step of `phase`; goes on where it was.

    Args:
      model: the teacher, with the student's ids (`train.teacher.teach_student_ids`).
      phase: in steps; its `compute_dtype`, `frozen_dtype` and `accumulate` are the teacher's too.
      mix, seed: of the phase that will distil.
      out: of several processes the first writes.
      mesh: what to shard it over; the model's parameters are on it already. The cache does not depend on it.

    Raises:
      ValueError: `out` holds a cache of other rows or of another teacher, k is more than the vocabulary, or the mesh does not
        fit.
    """
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"k must be in 1 ... {model.config.vocab_size}, the vocabulary, got {k}")
    if mesh is not None:
        check_mesh_fits(model.config, mesh, phase.rows_at_a_time, phase.seq_len)
    described, at_a_time = phase.described_rows(mix, seed), phase.rows_at_a_time
    mine = own_rows(mesh, at_a_time)
    rows = [begin + row for begin in range(0, phase.batch_size, at_a_time) for row in mine]
    stream = training_batches(corpus, **described, rows=rows)  # before anything is written: there may be no such rows
    made_of = {**corpus.identity(mix), "teacher": teacher_fingerprint(model), **cached_teacher(phase)}
    if is_first():
        TeacherCache(out, k, made_of=made_of, **described)
    barrier("described the cache")
    cache = TeacherCache(out, k, made_of=made_of, **described)
    missing = list(cache.missing(phase.steps))
    barrier("looked for what is missing")

    model.compute_dtype = jnp.dtype(phase.compute_dtype)
    nothing_trains = dict(trainable=(), objective="next_token", options={}, form="as_is", teacher="", teacher_cache="")
    layout = PhaseLayout(model, dataclasses.replace(phase, **nothing_trains))
    parameters = split_model(model)[1]
    del model
    _, parameters, _ = layout.begin(mesh, parameters)

    @jax.jit
    def answers(parameters, batch):
        model, _ = layout.models({}, parameters)
        hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
        return top_k_tokens(hidden, model.head, k)

    seq_devices = 1 if mesh is None else mesh.shape["seq"]

    def answers_in_time(part):
        found = answers(parameters, to_mesh(mesh, training_batch(part, seq_devices), at_a_time, mine))
        return tuple(from_zigzag(whole_array(x), seq_devices) for x in found)

    step = 0
    with in_mesh(mesh), progress_bar("cache-teacher", phase.steps, phase.steps - len(missing)) as bar:
        for wanted in missing:
            while step <= wanted:
                batch = next(stream)
                step += 1
            parts = [{n: x[i : i + len(mine)] for n, x in batch.items()} for i in range(0, len(rows), len(mine))]
            ids, log_probabilities = (np.concatenate(x) for x in zip(*map(answers_in_time, parts), strict=True))
            if is_first():
                cache.write(wanted, ids, log_probabilities)
            bar.update()
    return cache
