"""What the mixers of a hybrid begin with where its source gives nothing: drawn from a seed, one layer at a time."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers import Embedding
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.model import Layer, abstract_decoder
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, marks, named_state


def _as_transformers(fresh: Parameters, stated: Mapping[str, Marks], key: jax.Array, names: Mapping[str, Any]) -> Parameters:
    """As the layers draw them: kernels N(0, initializer_range^2), biases 0."""
    return fresh


def _as_torch(fresh: Parameters, stated: Mapping[str, Marks], key: jax.Array, names: Mapping[str, Any]) -> Parameters:
    """Kernels and biases drawn again as the constructors of torch's `Linear` and `Conv1d` draw them: uniform in
    +-1/sqrt(fan_in), where the fan-in is the inputs of a linear map or the taps of a depthwise convolution."""

    def draw(name, value):
        module, _, leaf = name.rpartition(".")
        if leaf not in ("kernel", "bias") or f"{module}.kernel" not in fresh or stated[name].zero:  # a norm may have a bias
            return value
        taps = stated[f"{module}.kernel"].layout == "conv"
        bound = 1 / math.sqrt(fresh[f"{module}.kernel"].shape[1 if taps else 0])
        return jax.random.uniform(jax.random.fold_in(key, names[name]), value.shape, value.dtype, -bound, bound)

    return {name: draw(name, value) for name, value in fresh.items()}


# How kernels and biases that attention does not give are drawn; decays, norms and D do not depend on it. Arguments: parameters by
# name, their marks, a key, and a number for every name to fold into it.
FRESH_PARAMETERS: dict[str, Callable[[Parameters, Mapping[str, Marks], jax.Array, Mapping[str, Any]], Parameters]] = {
    "transformers": _as_transformers,
    "torch": _as_torch,
}


def number_of(name: str) -> np.uint32:
    """Returns a number for a parameter's name, to fold into a key."""
    return np.uint32(zlib.crc32(name.encode()))


class _Draws:
    """Gives the keys that `nnx.Rngs(seed)` gives to a new decoder, from number `count` on."""

    def __init__(self, seed: int, count: Any = 0):
        self.key, self.count = jax.random.key(seed), count

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count = self.count + 1
        return key


def _number_of_draws(make: Callable[[Any], Any]) -> int:
    """Returns how many keys `make(rngs)` draws; nothing is made."""
    draws = _Draws(0)
    jax.eval_shape(lambda: nnx.split(make(draws))[1])
    return int(draws.count)


class FreshLayers:
    """What the layers of a hybrid begin with where its source gives nothing, one layer at a time: what `Decoder(config)` draws.

    Layers of one program are compiled once.

    Args:
      config: of the hybrid.
      seed, dtype, mesh, how: see `initialize_hybrid`; `how` is `fresh_parameters`.
    """

    def __init__(self, config: ModelConfig, *, seed: int, dtype: Any, mesh: Mesh | None, how: str):
        self.config, self.seed, self.dtype, self.mesh, self.how = config, seed, dtype, mesh, how
        self.marks = marks(abstract_decoder(config))
        self._made: dict[Any, Callable[..., Parameters]] = {}
        counted: dict[Any, int] = {}
        embedding = functools.partial(Embedding, config.vocab_size, config.hidden_size, std=config.initializer_range)
        self._drawn = [_number_of_draws(lambda rngs: embedding(rngs=rngs))]
        for i, program in enumerate(config.programs):
            if program not in counted:
                counted[program] = _number_of_draws(lambda rngs, i=i: Layer(config, i, rngs=rngs))
            self._drawn.append(self._drawn[-1] + counted[program])

    def of_layer(self, layer: int, names: Sequence[str]) -> Parameters:
        """Returns the parameters of one layer that `names` (inside the layer) ask for; no others are made."""
        program = (self.config.programs[layer], tuple(names))
        if program not in self._made:
            self._made[program] = self._compiled(layer, names)
        prefix = f"layers.{layer}."
        return self._made[program](np.uint32(self._drawn[layer]), {name: number_of(prefix + name) for name in names})

    def _compiled(self, layer: int, names: Sequence[str]) -> Callable[..., Parameters]:
        prefix = f"layers.{layer}."
        stated = {name.removeprefix(prefix): mark for name, mark in self.marks.items() if name.startswith(prefix)}

        def make(drawn, numbers):
            new = Layer(self.config, layer, rngs=_Draws(self.seed, drawn), dtype=self.dtype)  # pyright: ignore[reportArgumentType]
            state = named_state(nnx.split(new)[1])
            return FRESH_PARAMETERS[self.how]({name: state[name] for name in names}, stated, jax.random.key(self.seed), numbers)

        if self.mesh is None:
            return jax.jit(make)
        shapes = jax.eval_shape(make, np.uint32(0), dict.fromkeys(names, np.uint32(0)))
        where = {n: parameter_sharding(self.mesh, prefix + n, shapes[n].shape, stated[n].axes) for n in names}
        return jax.jit(make, out_shardings=where)
