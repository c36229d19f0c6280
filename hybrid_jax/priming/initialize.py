"""Stage 0: a hybrid from a Transformer's weights (arXiv 2605.08301, section 3)."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_choice
from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.layers import Embedding, mixer_class
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder, Layer, abstract_decoder
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, abstract_parameters, join_model, marks, named_state, split_model


def _like(value, fresh):
    """Returns the value sharded as the parameter that it replaces: slices and transposes of sharded arrays end up elsewhere."""
    return value if len(fresh.sharding.device_set) == 1 else jax.device_put(value, fresh.sharding)


def _as_transformers(fresh: Parameters, stated: Mapping[str, Marks], key: jax.Array, names: Mapping[str, Any]) -> Parameters:
    """As the layers draw them: kernels N(0, initializer_range^2), biases 0."""
    return fresh


def _as_torch(fresh: Parameters, stated: Mapping[str, Marks], key: jax.Array, names: Mapping[str, Any]) -> Parameters:
    """Kernels and biases drawn again as the constructors of torch's `Linear` and `Conv1d` draw them: uniform in
    +-1/sqrt(fan_in), where the fan-in is the inputs of a linear map or the taps of a depthwise convolution."""

    def draw(name, value):
        module, _, leaf = name.rpartition(".")
        if leaf not in ("kernel", "bias"):
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


def _number(name: str) -> np.uint32:
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
        return self._made[program](np.uint32(self._drawn[layer]), {name: _number(prefix + name) for name in names})

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


def new_model(config: ModelConfig, *, seed: int = 0, fresh_parameters: str = "transformers") -> Decoder:
    """Returns a model that nothing gives its parameters: every layer begins as its class says, recurrent mixers too.

    Args:
      fresh_parameters: as `initialize_hybrid` takes it, for the kernels and biases of the mixers that are not attention; all
        others are N(0, initializer_range^2) and 0.

    Raises:
      ValueError: `fresh_parameters` is neither.
    """
    check_choice("fresh_parameters", fresh_parameters, FRESH_PARAMETERS)
    model = Decoder(config, rngs=nnx.Rngs(seed))
    structure, parameters = split_model(model)
    prefixes = [f"layers.{i}.{KINDS[k].parameter_key}." for i, x in enumerate(config.layers) for k in x.kinds if k != ATTENTION]
    of_mixers = {name: x for name, x in parameters.items() if name.startswith(tuple(prefixes))}
    numbers = {name: _number(name) for name in of_mixers}
    drawn = FRESH_PARAMETERS[fresh_parameters](of_mixers, marks(model), jax.random.key(seed), numbers)
    return join_model(structure, parameters | drawn)


def check_convertible(have: ModelConfig, wanted: ModelConfig) -> None:
    """Checks that every mixer of `wanted` that `have` lacks replaces attention, and that those it has keep their heads.

    Raises:
      ValueError: one does not; names the layer.
    """
    for i, (old, new) in enumerate(zip(have.layers, wanted.layers, strict=True)):
        if ATTENTION not in old.kinds and not set(new.kinds) <= set(old.kinds):
            raise ValueError(f"layer {i} is {old.symbol!r}: only attention can become {new.symbol!r}")
        if new.kind != ATTENTION and new.kind in old.kinds and new.attention_heads != old.attention_heads:
            raise ValueError(
                f"layer {i} is {old.symbol!r}: its mixer keeps its heads, and only attention can become {new.symbol!r}; convert "
                "the source again"
            )


def initialize_hybrid(
    model: Decoder,
    pattern: str,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    fresh_parameters: str = "transformers",
    copy_attention: bool = True,
) -> Decoder:
    """The hybrid that `pattern` describes, its mixers initialized from the model's attention.

    What attention does not give (decays, gates of the update, convolutions) is drawn from `seed`. Layers that the
    pattern does not convert keep their weights, whatever they are. With a mesh every new parameter is made in its
    place on it.

    Args:
      fresh_parameters: how the kernels and biases that attention does not give are drawn. "transformers" (as
        hybrid-model-factory's models start): kernels N(0, initializer_range^2), biases 0. "torch": both uniform in
        +-1/sqrt(fan_in). The same in both: A_log = log U(0, 16), dt_bias = softplus^-1(dt) with dt log-uniform in
        [1e-3, 0.1] (Mamba-3: its options `dt_min`, `dt_max`), norms and Mamba-2's D 1.
      copy_attention: whether new recurrent mixers begin with attention's weights. False: they begin as in a new model, to learn
        everything from alignment (as MOHAWK's mixers do, arXiv 2408.10189); windows and kept heads of attention are copied.

    Raises:
      ValueError: the pattern is invalid, a layer that would be converted is not attention, or `fresh_parameters` is
        neither.
    """
    config, (_, have) = model.config.with_pattern(pattern), split_model(model)
    dtype = have["embed_tokens.embedding"].dtype
    options: dict[str, Any] = dict(seed=seed, mesh=mesh, fresh_parameters=fresh_parameters, copy_attention=copy_attention)
    parameters = dict(hybrid_parameters(model.config, have, config, dtype=dtype, **options))
    structure, _ = nnx.split(abstract_decoder(config, dtype=dtype, compute_dtype=model.compute_dtype))
    return join_model(structure, parameters)


def hybrid_parameters(
    source: ModelConfig,
    have: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: Any,
    seed: int = 0,
    mesh: Mesh | None = None,
    fresh_parameters: str = "transformers",
    copy_attention: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Yields the parameters of `initialize_hybrid` in the decoder's order; no more than one layer's new ones are made at a time.

    Args:
      source: the config of the source.
      have: its parameters; arrays, or anything of which `value[...]` is an array, that are asked for only where attention is
        converted. Those that the hybrid keeps are yielded as they are.
      config: of the hybrid, or of another form of the source.
      dtype: of what is made.
      seed, mesh, fresh_parameters, copy_attention: see `initialize_hybrid`, which also says what is raised.
    """
    check_choice("fresh_parameters", fresh_parameters, FRESH_PARAMETERS)
    check_convertible(source, config)
    layers: dict[int, list[str]] = {}
    for name in abstract_parameters(config):
        if name not in have:
            layers.setdefault(int(name.split(".")[1]), []).append(name)
    fresh = FreshLayers(config, seed=seed, dtype=dtype, mesh=mesh, how=fresh_parameters)
    made: Parameters = {}
    for name in abstract_parameters(config):
        if name in have:
            yield name, have[name]
            continue
        if name not in made:
            i, prefix = int(name.split(".")[1]), ".".join(name.split(".")[:2]) + "."
            new = fresh.of_layer(i, [n.removeprefix(prefix) for n in layers[i]])
            attention = {n.removeprefix(prefix + "self_attn."): have[n] for n in have if n.startswith(prefix + "self_attn.")}
            made = {prefix + n: x for n, x in _begun(attention, new, config, i, dtype, copy_attention).items()}
        yield name, made[name]


def _begun(
    attention: Mapping[str, Any], fresh: Parameters, config: ModelConfig, layer: int, dtype: Any, copy_attention: bool
) -> Parameters:
    """Returns the new parameters of a layer, by their names in it: as attention gives them, and else as drawn."""
    source = {name: jnp.asarray(value if isinstance(value, jax.Array) else value[...]) for name, value in attention.items()}
    result, spec = dict(fresh), config.layers[layer]
    for kind in spec.kinds:
        prefix = f"{KINDS[kind].parameter_key}."
        wanted = {n.removeprefix(prefix): v for n, v in fresh.items() if n.startswith(prefix)}
        if not wanted:
            continue
        copied = mixer_class(kind, config, layer).from_attention(source, wanted, config, layer)
        if KINDS[kind].recurrent and not copy_attention:
            kept = ("attention.", "merge.") if spec.attention_heads else ()
            copied = {n: v for n, v in copied.items() if n.startswith(kept)}
        result |= {prefix + n: _like(v.astype(dtype), wanted[n]) for n, v in copied.items()}
    return result
