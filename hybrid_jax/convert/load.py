"""Hugging Face directories -> decoders, one tensor at a time, straight into its final place."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from hybrid_jax.config import ModelConfig
from hybrid_jax.convert.names import hf_tensors
from hybrid_jax.families import config_from_hf
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parallel.sharding import place
from hybrid_jax.parameters import abstract_parameters, join_model, logical_axes
from hybrid_jax.priming.initialize import initialize_hybrid

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_IGNORED = ("rotary_emb.inv_freq",)


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not valid JSON ({e})") from None


def read_model_config(path: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory.

    Raises:
      FileNotFoundError: no such directory, or no config.json in it.
      ValueError: an unknown family or an unsupported option.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model directory at {path}; give a folder with config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; is it a Hugging Face model directory?")
    return config_from_hf(_read_json(path / "config.json"))


class TensorFiles(contextlib.ExitStack):
    """The safetensors files of a directory, sharded or not, opened and checked at once.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a file is truncated or not safetensors.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path = path
        if (path / INDEX).is_file():
            shards = sorted(set(_read_json(path / INDEX)["weight_map"].values()))
        elif (path / SINGLE).is_file():
            shards = [SINGLE]
        else:
            kinds = sorted({p.suffix for p in path.iterdir()})
            raise FileNotFoundError(
                f"{path} has neither {SINGLE} nor {INDEX} (file endings there: {', '.join(kinds)}); "
                "only safetensors weights are read"
            )
        missing = [s for s in shards if not (path / s).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; download them again"
            )
        self.files = {}
        for shard in shards:
            try:
                file = self.enter_context(safe_open(path / shard, framework="numpy"))
            except SafetensorError as e:
                raise ValueError(f"{path / shard} is truncated or not a safetensors file ({e}); download it again") from None
            self.files.update(dict.fromkeys(file.keys(), file))

    def __iter__(self):
        return iter(self.files)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, checked against the shape that the config implies."""
        tensor = self.files[name].get_tensor(name)
        if tensor.shape != shape:
            raise ValueError(f"{self.path}: tensor {name} must have shape {shape} by config.json, it has {tensor.shape}")
        return tensor


def _hf_shape(tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape a checkpoint's tensor must have to make a parameter (or an expert's slice) of `shape`."""
    return tensor.to_hf(np.broadcast_to(np.int8(0), shape)).shape


def _check_names(files: TensorFiles, wanted: set[str], config: ModelConfig):
    ignored = set() if not config.tie_embeddings else {"lm_head.weight"}
    have = {n for n in files if n not in ignored and not n.endswith(_IGNORED)}
    missing, extra = sorted(wanted - have), sorted(have - wanted)
    if missing or extra:
        parts = [
            f"{len(names)} {word}, the first {names[0]}" for names, word in ((missing, "missing"), (extra, "unexpected")) if names
        ]
        raise ValueError(
            f"{files.path}: the tensors do not fit config.json ({config.family}, pattern {config.pattern}): {'; '.join(parts)}"
        )


def check_model_directory(path: str | pathlib.Path) -> ModelConfig:
    """Checks a directory without reading its weights: config.json, every shard, every tensor's name.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    config = read_model_config(path)
    with TensorFiles(pathlib.Path(path)) as files:
        _check_names(files, {t.name for name in abstract_parameters(config) for t in hf_tensors(name, config)}, config)
    return config


def read_parameters(path, config: ModelConfig, dtype=None, mesh=None) -> Iterator[tuple[str, jax.Array]]:
    """Yields (name, array) for every parameter of a directory's model; all names are checked first.

    Raises:
      FileNotFoundError, ValueError: as `TensorFiles`; names or shapes that do not fit the config.
    """
    axes = logical_axes(abstract_decoder(config))
    shapes = {name: p.shape for name, p in abstract_parameters(config).items()}
    table = {name: hf_tensors(name, config) for name in shapes}
    with TensorFiles(pathlib.Path(path)) as files:
        _check_names(files, {t.name for tensors in table.values() for t in tensors}, config)
        for name, tensors in table.items():
            shape = shapes[name] if tensors[0].expert is None else shapes[name][1:]
            parts = [t.from_hf(files.read(t.name, _hf_shape(t, shape))) for t in tensors]
            value = parts[0] if tensors[0].expert is None else np.stack(parts)
            yield name, place(mesh, name, value.astype(dtype or value.dtype), axes[name])


def load_model(path, pattern: str | None = None, dtype=None, mesh=None, *, seed: int = 0) -> Decoder:
    """Loads a Hugging Face directory, a hybrid export of hybrid-model-factory, or one of ours.

    Args:
      path: the directory.
      pattern: turn the model into this hybrid (stage 0 of Priming: mixers initialised from attention).
      dtype: of the parameters; None keeps the files'.
      mesh: a `jax.sharding.Mesh`; parameters are read straight into their sharding on it.
      seed: of what the pattern initialises afresh.

    Raises:
      FileNotFoundError: the directory, its config or a shard is missing.
      ValueError: an unknown family, an invalid pattern, a truncated file, tensors that do not fit.
    """
    config = read_model_config(path)
    if pattern is not None:
        config.with_pattern(pattern)  # refuse before reading gigabytes
    dtype = None if dtype is None else jnp.dtype(dtype)
    parameters = dict(read_parameters(path, config, dtype, mesh))
    compute = dtype or jnp.dtype(parameters["embed_tokens.embedding"].dtype)
    structure, _ = nnx.split(abstract_decoder(config, dtype=compute))
    model = join_model(structure, parameters)
    if pattern is None:
        return model
    return initialize_hybrid(model, pattern, seed=seed, mesh=mesh)
