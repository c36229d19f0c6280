"""Stage 0: a hybrid from the weights of a Transformer, or of another hybrid (arXiv 2605.08301, section 3)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_choice
from hybrid_jax.config import ATTENTION, MixerSpec, ModelConfig
from hybrid_jax.copies import COPIES, begins_from, copied_pairs
from hybrid_jax.layers import mixer_class
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parameters import abstract_parameters, join_model, marks, split_model
from hybrid_jax.priming.fresh import FRESH_PARAMETERS, FreshLayers, number_of


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
    numbers = {name: number_of(name) for name in of_mixers}
    drawn = FRESH_PARAMETERS[fresh_parameters](of_mixers, marks(model), jax.random.key(seed), numbers)
    return join_model(structure, parameters | drawn)


def check_convertible(have: ModelConfig, wanted: ModelConfig) -> None:
    """Checks that every mixer of `wanted` that `have` lacks can begin from the layer's own, and that those it has keep their heads.

    Raises:
      ValueError: one does not; names the layer.
    """
    for i, (old, new) in enumerate(zip(have.layers, wanted.layers, strict=True)):
        begins = {begins_from(old, kind) for kind in new.kinds if kind not in old.kinds}
        if None in begins or (new.attention_heads and begins - {ATTENTION}):
            raise ValueError(
                f"layer {i} is {old.symbol!r}: only attention can become {new.symbol!r}; among mixers there is {copied_pairs()}"
            )
        if new.kind != ATTENTION and new.kind in old.kinds and new.attention_heads != old.attention_heads:
            raise ValueError(
                f"layer {i} is {old.symbol!r}: its mixer keeps its heads, and only attention can become {new.symbol!r}; convert "
                "the source again"
            )


def dtype_from(names: Iterable[str], source: ModelConfig, config: ModelConfig) -> str:
    """Returns the name of the parameter whose dtype new parameters of the hybrid have: of the first mixer that is replaced.

    In a checkpoint of several dtypes the copies then keep theirs. If no mixer is replaced, it is the embedding's.

    Args:
      names: of the source's parameters, in the decoder's order.
    """
    for i, (old, new) in enumerate(zip(source.layers, config.layers, strict=True)):
        if old.kinds != new.kinds:
            return next(n for n in names if n.startswith(f"layers.{i}.") and n.endswith(".kernel") and ".mlp." not in n)
    return "embed_tokens.embedding"


def initialize_hybrid(
    model: Decoder,
    pattern: str,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    fresh_parameters: str = "transformers",
    copy_attention: bool = True,
) -> Decoder:
    """The hybrid that `pattern` describes, its mixers initialized from the model's attention, or from its mixers (`copies.COPIES`).

    What these do not give (of attention: decays, gates of the update, convolutions) is drawn from `seed`. Layers that the
    pattern does not convert keep their weights, whatever they are. With a mesh every new parameter is made in its
    place on it.

    Args:
      fresh_parameters: how the kernels and biases that attention does not give are drawn. "transformers" (as
        hybrid-model-factory's models start): kernels N(0, initializer_range^2), biases 0. "torch": both uniform in
        +-1/sqrt(fan_in). The same in both: A_log = log U(0, 16), dt_bias = softplus^-1(dt) with dt log-uniform in
        [1e-3, 0.1] (Mamba-3: its options `dt_min`, `dt_max`), norms and Mamba-2's D 1.
      copy_attention: whether new recurrent mixers begin with the weights of the attention, or of the mixer, whose place they take.
        False: they begin as in a new model, to learn everything from alignment (as MOHAWK's mixers do, arXiv 2408.10189); windows
        and kept heads of attention are copied.

    Raises:
      ValueError: the pattern is invalid, a layer that would be converted has nothing from which the mixer can begin, or
        `fresh_parameters` is neither.
    """
    config, (_, have) = model.config.with_pattern(pattern), split_model(model)
    dtype = have[dtype_from(have, model.config, config)].dtype
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
      have: its parameters; arrays, or anything of which `value[...]` is an array, that are asked for only where a layer is
        converted. Those that the hybrid keeps are yielded as they are.
      config: of the hybrid, or of another form of the source.
      dtype: of what is made.
      seed, mesh, fresh_parameters, copy_attention: see `initialize_hybrid`, which also says what is raised.
    """
    check_choice("fresh_parameters", fresh_parameters, FRESH_PARAMETERS)
    check_convertible(source, config)
    names = list(abstract_parameters(config))
    absent: dict[int, list[str]] = {}  # layer -> names in it
    for name in names:
        if name not in have:
            _, layer, inside = name.split(".", 2)
            absent.setdefault(int(layer), []).append(inside)
    stream = number_of(source.pattern) if source.is_hybrid else 0
    fresh = FreshLayers(config, seed=seed, dtype=dtype, mesh=mesh, how=fresh_parameters, stream=stream) if absent else None
    made: dict[str, Any] = {}
    for name in names:
        if fresh is None or name in have:
            yield name, have[name]
            continue
        if name not in made:
            i = int(name.split(".")[1])
            place = f"layers.{i}."
            keys = tuple(f"{KINDS[kind].parameter_key}." for kind in source.layers[i].kinds)
            own = {n.removeprefix(place): have[n] for n in have if n.startswith(place)}
            own = {n: x for n, x in own.items() if n.startswith(keys)}
            begun = fresh.of_layer(i, absent[i], own, functools.partial(_given, config, i, source.layers[i], copy_attention))
            made = {f"layers.{i}.{n}": x for n, x in begun.items()}
        yield name, made[name]


def _given(
    config: ModelConfig, layer: int, old: MixerSpec, copy_attention: bool, own: Arrays, fresh: Arrays
) -> dict[str, jax.Array]:
    """Returns the new parameters that the layer's mixer, `old`, gives to a layer of the hybrid, by their names in it.

    Args:
      own: the parameters of the old mixer, by their names in the layer.
      fresh: the new ones as drawn.
    """
    result, spec = dict[str, jax.Array](), config.layers[layer]
    for kind in spec.kinds:
        prefix, origin = f"{KINDS[kind].parameter_key}.", begins_from(old, kind)
        wanted = {n.removeprefix(prefix): v for n, v in fresh.items() if n.startswith(prefix)}
        if not wanted or origin is None:
            continue
        place = f"{KINDS[origin].parameter_key}."
        given = {n.removeprefix(place): x for n, x in own.items() if n.startswith(place)}
        if origin == ATTENTION:
            copied = mixer_class(kind, config, layer).from_attention(given, wanted, config, layer)
        else:
            copied = COPIES[origin, kind].parameters(given, wanted)
        if KINDS[kind].recurrent and not copy_attention:
            kept = ("attention.", "merge.") if spec.attention_heads else ()
            copied = {n: v for n, v in copied.items() if n.startswith(kept)}
        result |= {prefix + name: value for name, value in copied.items()}
    return result
