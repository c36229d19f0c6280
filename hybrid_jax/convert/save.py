"""Decoders -> Hugging Face directories, written beside their place and renamed when complete."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hybrid_jax.config import ModelConfig
from hybrid_jax.convert.load import StoredParameter
from hybrid_jax.convert.names import hf_tensors
from hybrid_jax.convert.quantized import KEYS, Groups, QuantizationLoss, check_quantizable
from hybrid_jax.convert.tensor_file import DTYPES, FileTensor
from hybrid_jax.convert.writer import WeightWriter
from hybrid_jax.families import config_to_hf
from hybrid_jax.files import new_directory
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import barrier, is_first, notice, whole_array
from hybrid_jax.parameters import abstract_marks, abstract_parameters, split_model

MAX_SHARD_BYTES = 5_000_000_000
MOST_WAITING, MOST_WAITING_BYTES = 64, 1 << 28  # tensors, and their bytes in memory, that wait until they are written
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # a folder of chat templates by name


class Piece(NamedTuple):
    """Rows of a checkpoint's tensor along `axis`, from number `row` on; most often all of them.

    `stored` is a tensor of a file that has the bytes of all rows, if there is one.
    """

    name: str
    value: np.ndarray
    row: int = 0
    axis: int = 0
    stored: FileTensor | None = None


def hf_pieces(config: ModelConfig, parameters: Iterable[tuple[str, Any]]) -> Iterator[Piece]:
    """Yields the tensors of a checkpoint, piece by piece, of parameters by name.

    Args:
      parameters: each an array, or a `StoredParameter`, of which nothing is copied that its files hold in the same form.
    """
    stated = abstract_marks(config)
    for name, parameter in parameters:
        part = parameter.part if isinstance(parameter, StoredParameter) else functools.partial(_part, whole_array(parameter))
        for t in hf_tensors(name, stated[name].layout, config):
            value = t.to_hf(part(t.expert))
            if t.rows is None:
                yield Piece(t.name, value, stored=parameter.as_stored(t) if isinstance(parameter, StoredParameter) else None)
                continue
            for row, rows in t.rows.pieces(value):
                yield Piece(t.name, rows, row, t.rows.axis)


def _part(value: np.ndarray, expert: int | None) -> np.ndarray:
    return value if expert is None else value[expert]


def planned_tensors(config: ModelConfig, dtypes: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Returns the dtype and shape of every tensor of a checkpoint, by name.

    Args:
      dtypes: of the parameters, by name.
    """
    stated = abstract_marks(config)
    planned: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, parameter in abstract_parameters(config).items():
        for t in hf_tensors(name, stated[name].layout, config):
            dtype = jnp.promote_types(dtypes[name], planned.get(t.name, (dtypes[name],))[0])
            planned[t.name] = jnp.dtype(dtype), t.stored_shape(parameter.shape)
    return planned


def quantized_tensors(config: ModelConfig, quantization: Groups) -> tuple[set[str], set[str]]:
    """Returns the names of the weights that are quantized, of linear maps, experts and the embedding, and of those that would be if
    their inputs were a multiple of the group.

    Maps to one number per head or expert (decays, gates, routers) stay as they are: they are small, and a recurrence multiplies
    their errors over its tokens.

    Raises:
      ValueError: there are none, or the experts of a layer are in one tensor.
    """
    stated, found, left = abstract_marks(config), set(), set()
    of_mixers = (2 * (options.own_heads or 0) for options in config.mixers)  # two such maps may be in one tensor
    small = max(config.num_heads, config.moe.num_experts if config.moe else 0, *of_mixers)
    for name, parameter in abstract_parameters(config).items():
        if stated[name].layout not in ("transposed", "experts") and name != "embed_tokens.embedding":
            continue
        for t in hf_tensors(name, stated[name].layout, config):
            if stated[name].layout == "experts" and t.expert is None:
                raise ValueError(
                    f"tensor {t.name} holds the experts of a layer together, and such tensors are not quantized; export a model of "
                    f"a {config.family} without quantization"
                )
            rows, columns = t.stored_shape(parameter.shape)
            if rows > small:
                (left if columns % quantization.group_size else found).add(t.name)
    if not found:
        raise ValueError(f"no weight has inputs that are a multiple of {quantization.group_size}; choose smaller groups")
    return found, left


def write_parameters(
    config: ModelConfig,
    parameters: Iterable[tuple[str, Any]],
    dtypes: Mapping[str, Any],
    directory: pathlib.Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: Groups | None = None,
) -> None:
    """Writes weights and config.json into a directory that exists, one parameter after the other.

    Args:
      parameters: see `hf_pieces`; `MOST_WAITING_BYTES` of them are held, or one that is larger.
      dtypes: of all parameters, by name.
      quantization: how the weights of `quantized_tensors` are stored; size and error are said on stderr.
    """
    values = config_to_hf(config, jnp.dtype(dtypes["embed_tokens.embedding"]).name)
    planned, chosen, left, loss = planned_tensors(config, dtypes), set(), set(), QuantizationLoss()
    if quantization is not None:
        values[KEYS[0]] = {"group_size": quantization.group_size, "bits": quantization.bits}
        chosen, left = quantized_tensors(config, quantization)
        for name in sorted(chosen):
            dtype, shape = planned.pop(name)
            planned |= {name.removesuffix("weight") + end: x for end, x in quantization.planned(shape, dtype).items()}
    writer = WeightWriter(directory, planned, max_shard_bytes)

    def write(piece: Piece) -> None:
        if quantization is None or piece.name not in chosen:
            if piece.stored is not None and jnp.dtype(DTYPES[piece.stored.dtype]) == planned[piece.name][0]:
                writer.copy(piece.name, piece.stored)
            else:
                writer.write(piece.name, piece.value, piece.row, piece.axis)
            return
        module = piece.name.removesuffix("weight")
        check_quantizable(piece.name, piece.value)
        parts = quantization.quantize(piece.value, planned[f"{module}scales"][0])
        loss.add(piece.name, piece.value, parts, quantization)
        for end, value in parts.items():
            writer.write(module + end, value, piece.row)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # pieces are written while the next ones are made
        waiting: collections.deque[tuple[concurrent.futures.Future, int]] = collections.deque()
        for piece in hf_pieces(config, parameters):
            size = piece.value.nbytes if piece.stored is None else 0  # what is in a file needs no memory
            while waiting and (len(waiting) == MOST_WAITING or sum(n for _, n in waiting) + size > MOST_WAITING_BYTES):
                waiting.popleft()[0].result()
            waiting.append((thread.submit(write, piece), size))
        for written, _ in waiting:
            written.result()
    writer.check_complete()
    if quantization is not None:
        notice(str(loss))
        if left:
            notice(
                f"{len(left)} more weights stay as they are, the first {min(left)}: their inputs are no multiple of "
                f"{quantization.group_size}"
            )
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def copy_tokenizer(source: str | pathlib.Path, directory: pathlib.Path) -> None:
    """Copies a model directory's tokenizer files, byte for byte.

    Raises:
      FileNotFoundError: there is no directory `source`.
    """
    source = pathlib.Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"tokenizer_from: no directory at {source}; name a model directory, or give False for no files")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, directory / MORE_TEMPLATES, copy_function=shutil.copyfile)


def write_model(
    model: Decoder,
    directory: pathlib.Path,
    *,
    tokenizer_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: Groups | None = None,
) -> None:
    """Writes a model's files into a directory that exists; see `save_model`."""
    _, parameters = split_model(model)
    dtypes = {name: x.dtype for name, x in parameters.items()}
    write_parameters(model.config, parameters.items(), dtypes, directory, max_shard_bytes, quantization)
    if tokenizer_from is None and model.config.directory:
        if pathlib.Path(model.config.directory).is_dir():
            tokenizer_from = model.config.directory
        else:
            notice(
                f"{model.config.directory}, where the model was loaded from, is not there any more: the model is saved without "
                "tokenizer files"
            )
    if tokenizer_from:
        copy_tokenizer(tokenizer_from, directory)


def save_model(
    model: Decoder,
    path: str | pathlib.Path,
    *,
    tokenizer_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    quantization: Groups | None = None,
) -> None:
    """Writes a model as a Hugging Face directory: a source family's layout, or hybrid-model-factory's.

    Args:
      model: any decoder; its parameters keep their dtype.
      path: a directory that does not exist yet, or is empty.
      tokenizer_from: a directory whose tokenizer files are copied byte for byte. None: the directory the model was
        loaded from, if it was. False: no tokenizer files.
      max_shard_bytes: larger models are written in several files with an index.
      overwrite: whether a model directory at `path` is replaced, when the new one is complete.
      quantization: `Groups(bits=4)` or `Groups(bits=8)` stores linear maps and embeddings as integers in groups, as MLX does;
        `load_model` reads them as dense weights.

    Of several processes the first one writes.

    Raises:
      FileExistsError, PermissionError, NotADirectoryError: `path` cannot be made; nothing is left behind.
      FileNotFoundError: no directory at `tokenizer_from`.
    """
    if is_first():
        with new_directory(path, overwrite) as directory:
            options: dict[str, Any] = dict(max_shard_bytes=max_shard_bytes, quantization=quantization)
            write_model(model, directory, tokenizer_from=tokenizer_from, **options)
    else:
        for x in split_model(model)[1].values():  # the first process needs every process's parts
            whole_array(x)
    barrier(f"saved {path}")
