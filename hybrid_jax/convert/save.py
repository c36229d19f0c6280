"""Decoders -> Hugging Face directories, written beside their place and renamed when complete."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
from safetensors.numpy import save_file

from hybrid_jax.convert.names import hf_tensors
from hybrid_jax.convert.weights import INDEX, SINGLE
from hybrid_jax.families import config_to_hf
from hybrid_jax.files import new_directory
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import barrier, is_first, notice, whole_array
from hybrid_jax.parameters import marks, split_model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # a folder of chat templates by name


def hf_items(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of a checkpoint with its name, complete on every process."""
    _, parameters = split_model(model)
    stated = marks(model)
    fused: dict[str, dict[int, np.ndarray]] = {}  # tensors of which some rows are known, by their first row
    for name, value in parameters.items():
        value = whole_array(value)
        for t in hf_tensors(name, stated[name].layout, model.config):
            converted = np.ascontiguousarray(t.to_hf(value if t.expert is None else value[t.expert]))
            if t.rows is None:
                yield t.name, converted
                continue
            parts = fused.setdefault(t.name, {})
            parts[t.rows.start] = converted
            if sum(map(len, parts.values())) == t.rows.total:
                yield t.name, np.concatenate([part for _, part in sorted(fused.pop(t.name).items())])


def _write_weights(model: Decoder, directory: pathlib.Path, max_shard_bytes: int):
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = size = 0

    def flush():
        shards.append(list(pending))
        part = directory / f"{len(shards)}.part"
        save_file(pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors writes files that only their owner may read
        pending.clear()

    for name, value in hf_items(model):
        if pending and size + value.nbytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (directory / "1.part").rename(directory / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.part").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_directory(model: Decoder, tokenizer_from) -> pathlib.Path | None:
    """Where a saved model's tokenizer files come from; see `save_model`.

    Raises:
      FileNotFoundError: the directory that was named has no tokenizer files.
    """
    if tokenizer_from is None and model.config.directory:
        source = pathlib.Path(model.config.directory)
        if source.is_dir():
            return source
        notice(f"{source}, where the model was loaded from, is not there any more: the model is saved without tokenizer files")
    if not tokenizer_from:
        return None
    source = pathlib.Path(tokenizer_from)
    if not source.is_dir():
        raise FileNotFoundError(f"tokenizer_from: no directory at {source}; name a model directory, or give False for no files")
    return source


def write_model(
    model: Decoder,
    directory: pathlib.Path,
    *,
    tokenizer_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model's files into a directory that exists; see `save_model`."""
    _write_weights(model, directory, max_shard_bytes)
    dtype = str(model.embed_tokens.embedding[...].dtype)
    (directory / "config.json").write_text(json.dumps(config_to_hf(model.config, dtype), indent=2) + "\n")
    source = _tokenizer_directory(model, tokenizer_from)
    for name in TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if source is not None and (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, directory / MORE_TEMPLATES, copy_function=shutil.copyfile)


def save_model(
    model: Decoder,
    path: str | pathlib.Path,
    *,
    tokenizer_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face directory: a source family's layout, or hybrid-model-factory's.

    Args:
      model: any decoder; its parameters keep their dtype.
      path: a directory that does not exist yet, or is empty.
      tokenizer_from: a directory whose tokenizer files are copied byte for byte. None: the directory the model was
        loaded from, if it was. False: no tokenizer files.
      max_shard_bytes: larger models are written in several files with an index.
      overwrite: whether a model directory at `path` is replaced, when the new one is complete.

    Of several processes the first one writes.

    Raises:
      FileExistsError, PermissionError, NotADirectoryError: `path` cannot be made; nothing is left behind.
      FileNotFoundError: no directory at `tokenizer_from`.
    """
    if is_first():
        with new_directory(path, overwrite) as directory:
            write_model(model, directory, tokenizer_from=tokenizer_from, max_shard_bytes=max_shard_bytes)
    else:
        for _ in hf_items(model):  # the first process needs every process's parts
            pass
    barrier(f"saved {path}")
