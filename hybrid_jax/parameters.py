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
from hybrid_jax.iterations import Iterations
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
    described = abstract_decoder(config, compute_dtype=model.compute_dtype)
    described.remat, described.scan = model.remat, model.scan
    return join_model(nnx.split(described)[0], split_model(model)[1])


def with_iterations(model: Decoder, iterations: Iterations | None) -> Decoder:
    """Returns a model with the same parameters and other iterations of Gated KalmaNet, for inference.

    Fewer iterations are faster and less exact. The model computes what it would if `gka_config.num_iter` in its config.json were so
    many, in a forward pass, in decoding and where tokens are sharded; the arrays are not copied and the files are not changed.
    Layers with equal iterations that follow each other still share one program. Such a model is not saved.

    Args:
      model: a decoder, of which no layers are stacked (`stacking`).
      iterations: of every layer with Gated KalmaNet, `8`, or by layer, `{3: 8, 5: 4}`, where other layers have those of
        `GKAConfig.num_iter`; what was set before has no effect. They are counted as `num_iter` counts them: of Chebyshev's
        iteration; conjugate gradients (`solver` `cg`) run 3/5 of them, rounded up. 0 leaves the solve out, which is gated linear
        attention. None: as `num_iter` says.

    Raises:
      ValueError: the model has no layer with Gated KalmaNet, a layer that is named has none or does not exist, or iterations are
        outside 0 to 10,000 or not allowed by the options of the mixer.
    """
    config = model.config.with_iterations(iterations)
    return model if config == model.config else with_config(model, config)


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
