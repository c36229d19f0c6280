"""A model as (structure, named arrays): the form in which it is trained, saved and converted.

Names follow the module tree, which follows Hugging Face checkpoints: `layers.3.gka.q_proj.kernel`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.parameter import Marks, marks_of
from hybrid_jax.model import Decoder, abstract_decoder

Parameters = dict[str, jax.Array]


def split_model(model: Decoder) -> tuple[nnx.GraphDef, Parameters]:
    """The model's structure and its parameters by name."""
    structure, state = nnx.split(model)
    return structure, named_state(state)


def named_state(state: nnx.State) -> Parameters:
    """The arrays of a module's state, by name."""
    return {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)}


def join_model(structure: nnx.GraphDef, parameters: Mapping[str, jax.Array]) -> Decoder:
    """The inverse of `split_model`; works under jit."""
    paths: dict[Any, jax.Array] = {
        tuple(int(p) if p.isdigit() else p for p in name.split(".")): v for name, v in parameters.items()
    }
    return nnx.merge(structure, nnx.from_flat_state(paths))


def with_config(model: Decoder, config: ModelConfig) -> Decoder:
    """The same parameters in a model of another config, one that wants the same names and shapes."""
    return join_model(nnx.split(abstract_decoder(config, compute_dtype=model.compute_dtype))[0], split_model(model)[1])


@functools.lru_cache(maxsize=16)  # describing a decoder of 36 layers takes half a second
def _described(config: ModelConfig, dtype: jnp.dtype) -> Mapping[str, tuple[jax.ShapeDtypeStruct, Marks]]:
    _, state = nnx.split(abstract_decoder(config, dtype))
    flat = ((".".join(map(str, path)), value) for path, value in nnx.to_flat_state(state))
    return {name: (jax.ShapeDtypeStruct(value.shape, value.dtype), marks_of(value)) for name, value in flat}


def abstract_parameters(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """The names, shapes and dtypes of a model's parameters, without making it."""
    return {name: shape for name, (shape, _) in _described(config, jnp.dtype(dtype)).items()}


def abstract_marks(config: ModelConfig) -> dict[str, Marks]:
    """Returns the `marks` of a model of this config, without making it."""
    return {name: mark for name, (_, mark) in _described(config, jnp.dtype(jnp.float32)).items()}


def marks(model: Decoder) -> dict[str, Marks]:
    """Returns how every parameter of a model (or of its shapes) is sharded, computed with, trained and stored."""
    _, state = nnx.split(model)
    return {".".join(map(str, path)): marks_of(value) for path, value in nnx.to_flat_state(state)}


def logical_axes(model: Decoder) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axis names of every parameter, for sharding."""
    return {name: mark.axes for name, mark in marks(model).items()}


def select_names(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names in which some pattern (a regular expression) is found; `all` finds every one.

    Raises:
      ValueError: a pattern finds no parameter.
    """
    names, chosen = list(names), set()
    for pattern in patterns:
        found = set(names) if pattern == "all" else {n for n in names if re.search(pattern, n)}
        if not found:
            kinds = sorted({re.sub(r"^(layers\.)\d+(\.\w+).*", r"\1N\2", n) for n in names})
            raise ValueError(f"the pattern {pattern!r} matches no parameter; the model has {', '.join(kinds)}")
        chosen |= found
    return chosen


def count(parameters: Mapping[str, jax.Array]) -> int:
    """Number of scalars."""
    return sum(v.size for v in parameters.values())
