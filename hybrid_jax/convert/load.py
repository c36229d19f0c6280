"""Hugging Face directories -> decoders, one tensor at a time, straight into its final place."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_choice
from hybrid_jax.config import ModelConfig
from hybrid_jax.convert.names import Tensor, hf_tensors
from hybrid_jax.convert.quantized import KEYS, read_quantization
from hybrid_jax.convert.tensor_file import DTYPES, FileTensor
from hybrid_jax.convert.weights import TensorFiles
from hybrid_jax.families import FAMILIES, config_from_hf
from hybrid_jax.files import check_not_set_aside, read_json
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parallel.distributed import notice
from hybrid_jax.parallel.sharding import load_sharded
from hybrid_jax.parameters import abstract_marks, abstract_parameters, join_model
from hybrid_jax.priming.initialize import initialize_hybrid

_IGNORED = ("rotary_emb.inv_freq",)
BAND = 16  # columns of a transposed matrix that are copied at a time
HEAD = "lm_head.weight"


def read_model_config(path: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory.

    Raises:
      FileNotFoundError: no such directory, or no config.json in it.
      ValueError: an unknown family or an unsupported option.
    """
    path = pathlib.Path(path)
    check_not_set_aside(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model directory at {path}; give a folder with config.json and *.safetensors")
    values = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if (path / "stages").is_dir() or "schedule" in (values or ()):
        model = path / "model"
        hint = f"its model is {model}" if model.is_dir() else "it has no model yet: run its command again to finish it"
        raise ValueError(
            f"{path} is the working directory of a run, not a model directory; {hint}, its stages are in {path / 'stages'}"
        )
    if values is None:
        raise FileNotFoundError(f"{path} has no config.json; is it a Hugging Face model directory?")
    return config_from_hf(values)


def _in_files(files: TensorFiles, config: ModelConfig, name: str) -> str:
    """The name that a tensor has in the files: another one in those of a class that reads images too (`Family.wrapped`)."""
    names = (theirs + name.removeprefix(ours) for ours, theirs in FAMILIES[config.family].wrapped.items() if name.startswith(ours))
    return name if name in files else next((other for other in names if other in files), name)


def _embedding_and_head(files: TensorFiles, config: ModelConfig) -> tuple[str, str]:
    """The tensors that hold the embedding and the output head, as the files name them."""
    embedding = hf_tensors("embed_tokens.embedding", "same", config)[0].name
    return _in_files(files, config, embedding), _in_files(files, config, HEAD)


def _tied_as_stored(files: TensorFiles, config: ModelConfig) -> ModelConfig:
    """The config with the tying that the files have: as in transformers, a head that differs from the embedding is kept."""
    embedding, head = _embedding_and_head(files, config)
    if not config.tie_embeddings or not {embedding, head} <= set(files) or files.equal(embedding, head):
        return config
    notice(
        f"{files.path}: config.json has tie_word_embeddings = true, but {head} differs from {embedding}; both are kept, "
        "as transformers does (set tie_word_embeddings to false in config.json)"
    )
    return dataclasses.replace(config, tie_embeddings=False)


def _stacked_as_stored(files: TensorFiles, config: ModelConfig) -> ModelConfig:
    """The config with the form that the files have the experts in: one tensor for each, or one for all of a layer."""
    ignored = FAMILIES[config.family].ignored
    stacked = any(name.endswith(".experts.gate_up_proj") and not name.startswith(ignored) for name in files)
    return dataclasses.replace(config, stacked_experts=stacked) if config.moe else config


def _stored_name(files: TensorFiles, config: ModelConfig, name: str) -> str:
    """The tensor that holds `name`: of a tied model the head may be stored in place of the embedding."""
    embedding, head = _embedding_and_head(files, config)
    name = _in_files(files, config, name)
    return head if name == embedding and config.tie_embeddings and embedding not in files and head in files else name


def checked_table(files: TensorFiles, config: ModelConfig) -> tuple[ModelConfig, dict[str, list[tuple[Tensor, str]]]]:
    """Checks the files' tensors against the config by their headers.

    Returns:
      The config with the tying and the form of the experts of the files, and for every parameter the tensors that make it, each
      with the name it is stored by.

    Raises:
      ValueError: a name, shape or dtype that does not fit.
    """
    files.check_layers(config.num_layers, FAMILIES[config.family].ignored)
    config = _stacked_as_stored(files, _tied_as_stored(files, config))
    table, shapes, stated = {}, {}, abstract_marks(config)
    for name, parameter in abstract_parameters(config).items():
        table[name] = [(t, _stored_name(files, config, t.name)) for t in hf_tensors(name, stated[name].layout, config)]
        for tensor, stored in table[name]:
            shapes[stored] = tensor.stored_shape(parameter.shape)
    files.check_dtypes([n for n in shapes if n in files])  # first: quantized checkpoints have other names too
    unused = {n for n in files if n.endswith(_IGNORED)} | ({_in_files(files, config, HEAD)} if config.tie_embeddings else set())
    if others := {n for n in files if n.startswith(FAMILIES[config.family].ignored)}:
        notice(f"{files.path}: {len(others)} tensors are no part of the decoder and are not read, the first {min(others)}")
        unused |= others
    missing, extra = sorted(shapes.keys() - set(files)), sorted(set(files) - shapes.keys() - unused)
    if missing or extra:
        parts = [
            f"{len(names)} {word}, the first {names[0]}" for names, word in ((missing, "missing"), (extra, "unexpected")) if names
        ]
        raise ValueError(
            f"{files.path}: the tensors do not fit config.json ({config.family}, pattern {config.pattern}): {'; '.join(parts)}"
        )
    files.check_shapes(shapes)
    return config, table


def check_model_directory(path: str | pathlib.Path) -> ModelConfig:
    """Checks a directory by config.json and the headers of its files: every tensor's name, shape and dtype.

    Weights are read only where config.json ties the head to the embedding and the files hold both.

    Returns:
      The config, untied if the files hold a head that differs from the embedding.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    config, files = _open_files(path)
    return checked_table(files, config)[0]


def _cast(path: pathlib.Path, name: str, value: np.ndarray, dtype) -> np.ndarray:
    """A tensor in another dtype.

    Raises:
      ValueError: the dtype has a smaller range, and a value is beyond it.
    """
    with np.errstate(over="ignore"):
        cast = value.astype(dtype, copy=False)
    if jnp.finfo(dtype).max < jnp.finfo(value.dtype).max and not np.isfinite(cast).all() and np.isfinite(value).all():
        largest = float(np.abs(value.astype(np.float64)).max())
        raise ValueError(
            f"{path}: tensor {name} has values up to {largest:.3g}, beyond the range of {jnp.dtype(dtype).name}; load the model as "
            "bfloat16 or float32"
        )
    return cast


def _open_files(path: str | pathlib.Path) -> tuple[ModelConfig, TensorFiles]:
    """Returns a directory's config and its tensors; quantized weights appear as dense ones in both."""
    config = dataclasses.replace(read_model_config(path), directory=str(path))
    quantization = read_quantization(config.extra)
    if quantization is not None:
        config = dataclasses.replace(config, extra={k: v for k, v in config.extra.items() if k not in KEYS})
    return config, TensorFiles(pathlib.Path(path), quantization)


class StoredParameter:
    """A parameter of ours as the files hold it: a host reads what it indexes, and nothing else.

    Args:
      tensors: that make it, each with the name it is stored by (`checked_table`).
      shape: of the parameter.
      dtype: in which it is read; None: the files' (float32 for float64).
    """

    def __init__(self, files: TensorFiles, tensors: list[tuple[Tensor, str]], shape: tuple[int, ...], dtype: Any = None):
        self.shape, self._files, self._tensors = shape, files, tensors
        self._views: dict[str, np.ndarray] = {}  # quantized weights are computed once
        stored = functools.reduce(jnp.promote_types, (jnp.dtype(DTYPES[files[name].dtype]) for _, name in tensors))
        self.dtype = jnp.dtype(dtype or (jnp.float32 if stored == np.float64 else stored))

    def _view(self, number: int) -> np.ndarray:
        tensor, name = self._tensors[number]
        if name not in self._views:
            self._views[name] = self._files[name].view()
        value = self._views[name]
        return tensor.from_hf(value if tensor.rows is None else tensor.rows.of(value))

    def _cast(self, number: int, value: np.ndarray) -> np.ndarray:
        return _cast(self._files.path, self._tensors[number][1], value, self.dtype)

    def part(self, expert: int | None) -> np.ndarray:
        """Returns the parameter (or an expert's slice of it), without a copy where the files have its dtype."""
        return self._cast(expert or 0, self._view(expert or 0))

    def as_stored(self, wanted: Tensor) -> FileTensor | None:
        """Returns the files' tensor that has the bytes of `wanted`, a tensor of this parameter in a checkpoint; None: none has."""
        have, name = self._tensors[wanted.expert or 0]
        stored = self._files[name]
        same = (have.from_hf, have.expert, have.rows) == (wanted.from_hf, wanted.expert, None)
        return stored if same and isinstance(stored, FileTensor) and DTYPES.get(stored.dtype) == self.dtype.name else None

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns a copy of the part that a tuple of slices (or `...`) describes."""
        if index is Ellipsis:
            index = (slice(None),) * len(self.shape)
        if self._tensors[0][0].expert is None:
            return _contiguous(self._cast(0, self._view(0)[index]))
        experts = range(*index[0].indices(self.shape[0]))
        return np.stack([self._cast(e, self._view(e)[index[1:]]) for e in experts])


def _contiguous(x: np.ndarray) -> np.ndarray:
    """Returns a contiguous copy. A transposed matrix is copied in bands, which takes a fifth of the time."""
    if x.ndim != 2 or x.flags.c_contiguous:
        return np.array(x, order="C")
    out = np.empty(x.shape, x.dtype)
    for i in range(0, x.shape[1], BAND):
        out[:, i : i + BAND] = x[:, i : i + BAND]
    return out


class StoredParameters(Mapping[str, StoredParameter]):
    """The parameters of a directory, each read where it is indexed.

    Args:
      table: `checked_table`'s of `files` and `config`.
      dtype: in which they are read; None: the files'.
    """

    def __init__(self, files: TensorFiles, config: ModelConfig, table: dict[str, list[tuple[Tensor, str]]], dtype: Any = None):
        self.files, self.table, self._dtype = files, table, dtype
        self._shapes = abstract_parameters(config)

    def __getitem__(self, name: str) -> StoredParameter:
        return StoredParameter(self.files, self.table[name], self._shapes[name].shape, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def open_parameters(path: str | pathlib.Path, dtype: Any = None) -> tuple[ModelConfig, StoredParameters]:
    """Checks a directory as `check_model_directory` does and returns its config, and its parameters to be read one by one.

    Args:
      path: the directory.
      dtype: in which parameters are read; None: the files'.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    if dtype is not None:
        dtype = jnp.dtype(dtype)
        check_choice("dtype", dtype.name, DTYPES.values())
    config, files = _open_files(path)
    config, table = checked_table(files, config)
    return config, StoredParameters(files, config, table, dtype)


def load_parameters(config: ModelConfig, parameters: StoredParameters, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Reads every parameter straight into its sharding on a mesh; no host holds more than one that is not in its place yet."""
    stated, loaded = abstract_marks(config), {}
    for name, value in parameters.items():
        loaded[name] = jax.block_until_ready(load_sharded(mesh, name, value, stated[name].axes))
    return loaded


def load_model(
    path: str | pathlib.Path, pattern: str | None = None, dtype: Any = None, mesh: Mesh | None = None, *, seed: int = 0
) -> Decoder:
    """Loads a Hugging Face directory, a hybrid export of hybrid-model-factory, or one of ours.

    Args:
      path: the directory.
      pattern: turn the model into this hybrid (stage 0 of Priming: mixers initialized from attention).
      dtype: of the parameters; None keeps the files'.
      mesh: a `jax.sharding.Mesh`; parameters are read straight into their sharding on it.
      seed: of what the pattern initializes afresh.

    Raises:
      FileNotFoundError: the directory, its config or a shard is missing.
      ValueError: an unknown family, an invalid pattern or dtype, a truncated file, tensors that do not fit.
    """
    if pattern is not None:
        read_model_config(path).with_pattern(pattern)  # refuse before the headers of all files are read
    config, stored = open_parameters(path, dtype)
    parameters = load_parameters(config, stored, mesh)
    compute = parameters["embed_tokens.embedding"].dtype
    structure, _ = nnx.split(abstract_decoder(config, dtype=compute))
    model = join_model(structure, parameters)
    if pattern is None:
        return model
    return initialize_hybrid(model, pattern, seed=seed, mesh=mesh)
