"""Iterations of Gated KalmaNet at inference: how many each layer's solve takes, whatever the model was trained with.

They are counted as `GKAConfig.num_iter` counts them, for either solver: `chebyshev` runs so many; `cg` runs 3/5 of them, rounded
up, which are about as exact. 0 leaves the solve out. Like `hybrid_jax.config` this module imports no array library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from hybrid_jax.options import MixerOptions
from hybrid_jax.pattern import MixerSpec
from hybrid_jax.recurrent_options import GKAConfig

_Options = TypeVar("_Options", bound=MixerOptions)


class Layers(Protocol):
    """What is read here of a model: `hybrid_jax.config.ModelConfig`, which reads this module."""

    @property
    def num_layers(self) -> int: ...

    @property
    def layers(self) -> Sequence[MixerSpec]: ...

    @property
    def pattern(self) -> str: ...

    def solves(self, layer: int) -> bool: ...

    def options(self, cls: type[_Options]) -> _Options: ...


Iterations = int | Mapping[int, int]
"""Of every layer with Gated KalmaNet; or by the layer's number, where other layers stay as they were trained."""

FORMS = "8, of every layer with Gated KalmaNet, or 3:8,5:4, of layers 3 and 5"


def read_iterations(name: str, value: Any) -> Iterations:
    """Returns iterations given as an integer, as a mapping, or as text: `8`, or `3:8,5:4` for 8 in layer 3 and 4 in layer 5.

    Args:
      name: of the option, for messages.

    Raises:
      ValueError: it is none of these, a number is out of range, or a layer is named twice.
    """
    check = GKAConfig.checks()["num_iter"]
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, str) and ":" in value:
        pairs = [part.strip().split(":") for part in value.split(",")]
    else:
        return check(name, int(value) if isinstance(value, str) and value.strip().isdecimal() else value)
    found: dict[int, int] = {}
    for pair in pairs:
        try:
            layer, number = (int(x) if isinstance(x, str) else x for x in pair)
        except ValueError:
            raise ValueError(f"{name} must be {FORMS}, got {value!r}") from None
        if layer in found:
            raise ValueError(f"{name} names layer {layer} twice, got {value!r}")
        found[layer] = check(f"{name}, layer {layer},", number)
    if not found:
        raise ValueError(f"{name} must be {FORMS}, got {value!r}")
    return found


def as_text(iterations: Iterations) -> str:
    """Returns the text that `read_iterations` reads: layers in order."""
    if isinstance(iterations, int):
        return str(iterations)
    return ",".join(f"{layer}:{number}" for layer, number in sorted(iterations.items()))


def of_layers(config: Layers, iterations: Iterations | None) -> tuple[int | None, ...]:
    """Returns `ModelConfig.gka_iterations`: of each layer its own iterations, or None where they are those of the config's options.

    Raises:
      ValueError: the model has no layer with Gated KalmaNet, or see `read_iterations` and `check_iterations`.
    """
    solving = [i for i in range(config.num_layers) if config.solves(i)]
    if iterations is None:
        return ()
    iterations = read_iterations("iterations", iterations)
    if not solving:
        raise ValueError(
            f"iterations are set of layers with Gated KalmaNet (GKA), and the model has none; its pattern is {config.pattern}"
        )
    given = dict.fromkeys(solving, iterations) if isinstance(iterations, int) else dict(iterations)
    check_iterations(config, given)
    trained = config.options(GKAConfig).num_iter
    own = tuple(None if n == trained else n for n in map(given.get, range(config.num_layers)))
    return () if own.count(None) == len(own) else own


def check_iterations(config: Layers, iterations: Mapping[int, int]) -> None:
    """Checks iterations by layer against a model.

    Raises:
      ValueError: a layer does not exist or has no Gated KalmaNet, or its options do not allow so many iterations.
    """
    for layer, number in iterations.items():
        exists = layer in range(config.num_layers)
        if not exists or not config.solves(layer):
            what = f"is {config.layers[layer].symbol}" if exists else "does not exist"
            there = ", ".join(str(i) for i in range(config.num_layers) if config.solves(i)) or "none"
            raise ValueError(f"iterations of layer {layer}, which {what}; the layers with Gated KalmaNet are {there}")
        try:
            dataclasses.replace(config.options(GKAConfig), num_iter=number)
        except ValueError as e:
            raise ValueError(f"iterations of layer {layer}: {e}") from None
