"""What the mixers of a hybrid begin with where its source gives nothing: drawn from a seed, one layer at a time."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.layers import Embedding
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.model import Layer
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, abstract_marks, named_state


def _as_transformers(fresh: Parameters, stated: Mapping[str, Marks], key: jax.Array, names: Mapping[str, Any]) -> Parameters:
    """As the layers draw them: kernels N(0, initializer_range^2), biases 0."""
    return fresh


def _as_torch(fresh: Parameters, stated: Mapping[str, Marks], key: jax.Array, names: Mapping[str, Any]) -> Parameters:
    """Kernels and biases drawn again as the constructors of torch's `Linear` and `Conv1d` draw them: uniform in
    +-1/sqrt(fan_in), where the fan-in is the inputs of a linear map or the taps of a depthwise convolution. Layers whose kernels
    have a start of their own (`Marks.own_start`) keep it."""

    def draw(name, value):
        module, _, leaf = name.rpartition(".")
        if leaf not in ("kernel", "bias") or f"{module}.kernel" not in fresh:  # a norm may have a bias
            return value
        if stated[f"{module}.kernel"].own_start:
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
    """Gives the keys that `nnx.Rngs(seed)` gives to a new decoder, from number `count` on.

    Args:
      stream: not 0: other keys, of a stream of so many.
    """

    def __init__(self, seed: int, count: Any = 0, stream: int | np.uint32 = 0):
        key = jax.random.key(seed)
        self.key, self.count = jax.random.fold_in(key, stream) if stream else key, count

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count = self.count + 1
        return key


def _number_of_draws(make: Callable[[Any], Any]) -> int:
    """Returns how many keys `make(rngs)` draws; nothing is made."""
    draws = _Draws(0)
    jax.eval_shape(lambda: nnx.split(make(draws))[1])
    return int(draws.count)


Copy = Callable[[Mapping[str, jax.Array], Parameters], Mapping[str, jax.Array]]
"""(a source's parameters, what is drawn) -> the parameters that the source gives, by name; one of the source's arrays itself is
passed on as it is."""


class _Program(NamedTuple):
    """How the layers of one program begin.

    Args:
      as_it_is: name -> the name in the source of what begins as it is there.
      read: the names in the source that `make` takes.
      make: (source, keys drawn before the layer, a number for every name) -> all other parameters.
    """

    as_it_is: Mapping[str, str]
    read: Sequence[str]
    make: Callable[[Mapping[str, jax.Array], np.uint32, Mapping[str, np.uint32]], Parameters]


def _nothing(source: Mapping[str, jax.Array], drawn: Parameters) -> Parameters:
    return {}


class FreshLayers:
    """What the layers of a hybrid begin with, one layer at a time: what their source gives, and else what `Decoder(config)` draws.

    Layers of one program are compiled once, copies and draws together, so that nothing is drawn that a copy replaces.

    Args:
      config: of the hybrid.
      seed, dtype, mesh, how: see `initialize_hybrid`; `how` is `fresh_parameters`.
      stream: not 0: other draws than a new decoder's. A hybrid whose next layers are converted needs them: with the same seed the
        keys of its first conversion would come again.

    Raises:
      ValueError: the seed is no integer from 0 to 2^32 - 1; JAX has no other ones.
    """

    def __init__(self, config: ModelConfig, *, seed: int, dtype: Any, mesh: Mesh | None, how: str, stream: int | np.uint32 = 0):
        check_integer("seed", seed, minimum=0, maximum=2**32 - 1)
        self.config, self.seed, self.dtype, self.mesh, self.how = config, seed, dtype, mesh, how
        self.stream = stream
        self.marks = abstract_marks(config)
        self._programs: dict[Any, _Program] = {}
        counted: dict[Any, int] = {}
        embedding = functools.partial(Embedding, config.vocab_size, config.hidden_size, std=config.initializer_range)
        self._drawn = [_number_of_draws(lambda rngs: embedding(rngs=rngs))]
        for i, program in enumerate(config.programs):
            if program not in counted:
                counted[program] = _number_of_draws(lambda rngs, i=i: Layer(config, i, rngs=rngs))
            self._drawn.append(self._drawn[-1] + counted[program])

    def of_layer(
        self, layer: int, names: Sequence[str], source: Mapping[str, Any] | None = None, copy: Copy = _nothing
    ) -> dict[str, Any]:
        """Returns the parameters of one layer that `names` (inside the layer) ask for; no others are made.

        Args:
          source: what `copy` takes: arrays, or anything with a shape and a dtype of which `value[...]` is an array. What begins as
            it is in the source is returned as it was given, if it has the dtype.
          copy: which parameters the source gives; the same for all layers of one program.
        """
        source = source or {}
        key = (self.config.programs[layer], tuple(names), tuple((n, x.shape, jnp.dtype(x.dtype)) for n, x in source.items()))
        if key not in self._programs:
            self._programs[key] = self._compiled(layer, names, source, copy)
        program, prefix = self._programs[key], f"layers.{layer}."
        numbers = {name: number_of(prefix + name) for name in names}
        read = {name: _array(source[name]) for name in program.read}
        made = program.make(read, np.uint32(self._drawn[layer]), numbers)
        return {n: self._placed(layer, n, source[program.as_it_is[n]]) if n in program.as_it_is else made[n] for n in names}

    def _placed(self, layer: int, name: str, value: Any) -> Any:
        """Returns a source's parameter in its dtype, sharded as the layer's own."""
        if value.dtype != self.dtype:
            value = _array(value).astype(self.dtype)
        if self.mesh is None or not isinstance(value, jax.Array):
            return value
        full = f"layers.{layer}.{name}"
        return jax.device_put(value, parameter_sharding(self.mesh, full, value.shape, self.marks[full].axes))

    def _compiled(self, layer: int, names: Sequence[str], source: Mapping[str, Any], copy: Copy) -> _Program:
        prefix = f"layers.{layer}."
        stated = {name.removeprefix(prefix): mark for name, mark in self.marks.items() if name.startswith(prefix)}
        as_it_is: dict[str, str] = {}

        def make(source, drawn, numbers):
            new = Layer(self.config, layer, rngs=_Draws(self.seed, drawn, self.stream), dtype=self.dtype)  # pyright: ignore[reportArgumentType]
            state = named_state(nnx.split(new)[1])
            fresh = FRESH_PARAMETERS[self.how]({name: state[name] for name in names}, stated, jax.random.key(self.seed), numbers)
            copied, given = copy(source, fresh), {id(x): name for name, x in source.items()}
            as_it_is.update({name: given[id(x)] for name, x in copied.items() if id(x) in given})
            made = {**fresh, **{name: x.astype(self.dtype) for name, x in copied.items()}}
            return {name: x for name, x in made.items() if name not in as_it_is}

        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in source.items()}
        described, outputs = jax.make_jaxpr(make, return_shape=True)(shapes, np.uint32(0), dict.fromkeys(names, np.uint32(0)))
        used = {id(x) for equation in described.eqns for x in (*equation.invars, *described.jaxpr.outvars)}
        read = [name for name, x in zip(sorted(shapes), described.jaxpr.invars, strict=False) if id(x) in used]

        def make_of_read(read, drawn, numbers):
            absent = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items() if name not in read}
            return make({**read, **absent}, drawn, numbers)

        where = None
        if self.mesh is not None:
            where = {n: parameter_sharding(self.mesh, prefix + n, x.shape, stated[n].axes) for n, x in outputs.items()}
        return _Program(as_it_is, read, jax.jit(make_of_read, out_shardings=where))


def _array(value: Any) -> jax.Array:
    return value if isinstance(value, jax.Array) else jnp.asarray(value[...])
