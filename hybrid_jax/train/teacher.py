"""A teacher other than the source: any model of the student's tokenizer, of which a phase takes next-token distributions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

import jax
from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.convert.weights import weight_files
from hybrid_jax.data.teacher_cache import TEACHER_FILES
from hybrid_jax.files import read_json
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parameters import join_model, logical_axes, split_model
from hybrid_jax.train.phase import Phase

BLOCK, BLOCKS = 1 << 16, 256  # bytes of a part of a file of weights, and how many parts `files_digest` reads at most


def with_student_ids(teacher: ModelConfig, student: ModelConfig) -> ModelConfig:
    """Returns the teacher's config with the student's vocabulary: rows of its embedding and head behind it are left out.

    Raises:
      ValueError: the teacher has fewer ids than the student, or it is fused, so that it is two models.
    """
    if teacher.is_fused:
        raise ValueError(
            f"the teacher is a fused model ({teacher.pattern}), a teacher and a student in one; export the one that shall teach "
            "with hybrid-jax export"
        )
    if teacher.vocab_size < student.vocab_size:
        raise ValueError(
            f"the teacher has a vocabulary of {teacher.vocab_size}, the student one of {student.vocab_size}: to the ids above it "
            "the teacher gives no probability; take a teacher with at least as many ids"
        )
    return dataclasses.replace(teacher, vocab_size=student.vocab_size)


def teach_student_ids(teacher: Decoder, student: ModelConfig) -> Decoder:
    """Returns the teacher with the student's ids alone, over which its distribution is then normalized.

    Models of one tokenizer differ in how far their embeddings are padded. Ids behind the student's vocabulary are in no text.

    Raises:
      ValueError: as of `with_student_ids`.
    """
    config = with_student_ids(teacher.config, student)
    if config.vocab_size == teacher.config.vocab_size:
        return teacher
    axes, parameters = logical_axes(teacher), split_model(teacher)[1]

    def kept(name: str, x: jax.Array) -> jax.Array:
        if "vocab" not in axes[name]:
            return x
        part = tuple(slice(config.vocab_size if axis == "vocab" else None) for axis in axes[name])
        return jax.jit(lambda x: x[part], out_shardings=x.sharding)(x)

    structure, _ = nnx.split(abstract_decoder(config, compute_dtype=teacher.compute_dtype))
    return join_model(structure, {name: kept(name, x) for name, x in parameters.items()})


def cached_teacher(phase: Phase) -> dict[str, str]:
    """Returns what a cache records of the teacher that a phase names, beside the fingerprint of its arrays.

    It is read from the files, so that a phase can be checked against its cache without loading the teacher.
    """
    return {TEACHER_FILES: files_digest(phase.teacher)} if phase.teacher else {}


def files_digest(directory: str | pathlib.Path) -> str:
    """Returns a hash of a model directory that is the same for a copy of it; it is quick for large models.

    Of config.json all is read, of a file of weights its size and `BLOCKS` parts at even distances (all of a file of 16 MiB or
    less): models of the same shapes that were trained otherwise differ, a few changed weights may not be seen.

    Raises:
      FileNotFoundError, ValueError: the directory has no config.json or no weights.
    """
    directory = pathlib.Path(directory)
    found = hashlib.sha256(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode())
    for name in weight_files(directory):
        path = directory / name
        size = path.stat().st_size
        found.update(f"{name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(min(BLOCKS, -(-size // BLOCK))):
                file.seek(max(part * BLOCK, part * (size - BLOCK) // (BLOCKS - 1)))
                found.update(file.read(BLOCK))
    return found.hexdigest()
