"""Directories -> directories: conversion and export parameter by parameter, so that no model is held in memory."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from hybrid_jax.config import ModelConfig
from hybrid_jax.convert.load import open_parameters, read_model_config
from hybrid_jax.convert.quantized import Groups
from hybrid_jax.convert.save import MAX_SHARD_BYTES, copy_tokenizer, write_parameters
from hybrid_jax.files import check_new_directory, new_directory
from hybrid_jax.parallel.distributed import barrier, is_first
from hybrid_jax.parameters import abstract_parameters
from hybrid_jax.priming.initialize import check_convertible, dtype_from, hybrid_parameters
from hybrid_jax.progress import progress_bar


def convert_directory(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    form: Callable[[ModelConfig], ModelConfig] = lambda config: config,
    *,
    dtype: Any = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    quantization: Groups | None = None,
) -> ModelConfig:
    """Converts a model directory into another one as `load_model`, `initialize_hybrid` and `save_model` do, parameter by parameter.

    What the hybrid keeps goes from file to file; memory is needed for the largest tensor and for one layer's new mixers.

    Args:
      source: a Hugging Face directory, or a hybrid one.
      out: the directory to make; the tokenizer's files come with it.
      form: the source's config -> the config of the result: `lambda c: c.with_pattern("*-GKA")`, `ModelConfig.unfused`.
      dtype: of the parameters; None: the source's.
      seed: of what is initialized afresh.
      max_shard_bytes: larger models are written in several files with an index.
      overwrite: whether a model directory at `out` is replaced, when the new one is complete.
      quantization: see `save_model`.

    Of several processes the first one works.

    Returns:
      The config of the result.

    Raises:
      FileExistsError, PermissionError, NotADirectoryError: `out` cannot be made; nothing is left behind.
      FileNotFoundError, ValueError: as `load_model` and `initialize_hybrid`, before anything is written.
    """
    check_new_directory(out, overwrite, source)
    form(read_model_config(source))  # refuse before the headers of all files are read
    have, stored = open_parameters(source, dtype)
    config = form(have)
    check_convertible(have, config)
    if config.tie_embeddings != have.tie_embeddings:
        raise ValueError(f"{source}: tie_word_embeddings is {have.tie_embeddings} there, and a conversion cannot change it")
    new = jnp.dtype(stored[dtype_from(stored, have, config)].dtype)
    dtypes = {name: stored[name].dtype if name in stored else new for name in abstract_parameters(config)}

    def shown() -> Iterator[tuple[str, Any]]:
        with progress_bar(name="convert", unit="parameter", total=len(dtypes)) as bar:
            for item in hybrid_parameters(have, stored, config, dtype=new, seed=seed):
                yield item
                bar.update()

    if is_first():
        with new_directory(out, overwrite) as directory:
            write_parameters(config, shown(), dtypes, directory, max_shard_bytes, quantization)
            copy_tokenizer(source, directory)
    barrier(f"converted {out}")
    return config
