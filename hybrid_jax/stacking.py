"""A model for training: layers that repeat as one layer whose parameters are stacked, [count, ...] each.

So neither the layers' program nor the optimizer's grows with their number. Of a run's unit, layer j of the stacked
model stands for several of the source's; `layers.J.…` names its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parameters import Parameters, abstract_parameters, marks
from hybrid_jax.repeats import Repeat, find_repeats


def _of_layer(names: Collection[str], i: int) -> list[str]:
    prefix = f"layers.{i}."
    return [n.removeprefix(prefix) for n in names if n.startswith(prefix)]


def training_repeats(config: ModelConfig, trainable: Collection[str]) -> tuple[Repeat, ...]:
    """Runs of layers of one kind of which the same parameters train."""
    own = [frozenset(_of_layer(trainable, i)) for i in range(config.num_layers)]
    return tuple(find_repeats(list(zip(config.programs, own, strict=True))))


def _bodies(repeats: Collection[Repeat]) -> Iterator[tuple[int, range]]:
    """(layer of the stacked model, the layers it stands for)."""
    yield from enumerate(place for repeat in repeats for place in repeat.places)


def stacked_names(config: ModelConfig, repeats: Collection[Repeat]) -> dict[str, list[str]]:
    """Name in the stacked model -> the names it stands for, in order of depth."""
    names = abstract_parameters(config)
    result = {n: [n] for n in names if not n.startswith("layers.")}
    for j, place in _bodies(repeats):
        result |= {f"layers.{j}.{n}": [f"layers.{i}.{n}" for i in place] for n in _of_layer(names, place[0])}
    return result


def stacked_structure(model: Decoder, repeats: Collection[Repeat]) -> tuple[nnx.GraphDef, dict[str, Marks]]:
    """Returns the stacked model's structure, and the marks of its parameters, whose axes count the stacked dimension too.

    The marks inside the structure stay those of one layer, which is what a scanned layer sees.
    """
    stacked = abstract_decoder(model.config, compute_dtype=model.compute_dtype)
    stacked.layers = nnx.List([stacked.layers[place[0]] for _, place in _bodies(repeats)])
    stacked.remat, stacked.repeats = model.remat, tuple(repeats)
    found = marks(stacked)
    counts = {f"layers.{j}": len(place) for j, place in _bodies(repeats)}
    for name, mark in found.items():
        if counts.get(".".join(name.split(".")[:2]), 1) > 1:
            found[name] = dataclasses.replace(mark, axes=(None, *mark.axes))
    return nnx.split(stacked)[0], found


def stack(parameters: Parameters, names: Mapping[str, list[str]]) -> Parameters:
    """Parameters by the stacked model's names; those of `names` whose sources are absent are left out."""
    found = {new: olds for new, olds in names.items() if olds[0] in parameters}
    return {new: parameters[olds[0]] if len(olds) == 1 else jnp.stack([parameters[n] for n in olds]) for new, olds in found.items()}


def unstack(parameters: Parameters, names: Mapping[str, list[str]]) -> Parameters:
    """The inverse of `stack`."""
    result = {}
    for new, olds in names.items():
        if new in parameters:
            result |= {olds[0]: parameters[new]} if len(olds) == 1 else {n: parameters[new][i] for i, n in enumerate(olds)}
    return result
