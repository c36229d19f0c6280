"""Stage 0: a hybrid from a Transformer's weights (arXiv 2605.08301, section 3)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_choice
from hybrid_jax.config import ATTENTION, ModelConfig
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
    names = list(abstract_parameters(config))
    absent: dict[int, list[str]] = {}  # layer -> names in it
    for name in names:
        if name not in have:
            _, layer, inside = name.split(".", 2)
            absent.setdefault(int(layer), []).append(inside)
    fresh = FreshLayers(config, seed=seed, dtype=dtype, mesh=mesh, how=fresh_parameters) if absent else None
    made: dict[str, Any] = {}
    for name in names:
        if fresh is None or name in have:
            yield name, have[name]
            continue
        if name not in made:
            i = int(name.split(".")[1])
            place = f"layers.{i}.self_attn."
            attention = {n.removeprefix(place): have[n] for n in have if n.startswith(place)}
            begun = fresh.of_layer(i, absent[i], attention, functools.partial(_given, config, i, copy_attention))
            made = {f"layers.{i}.{n}": x for n, x in begun.items()}
        yield name, made[name]


def _given(config: ModelConfig, layer: int, copy_attention: bool, attention: Arrays, fresh: Arrays) -> dict[str, jax.Array]:
    """Returns the parameters that attention gives to a layer of the hybrid, by their names in it."""
    result: dict[str, jax.Array] = {}
    spec = config.layers[layer]
    for kind in spec.kinds:
        prefix = f"{KINDS[kind].parameter_key}."
        wanted = {n.removeprefix(prefix): v for n, v in fresh.items() if n.startswith(prefix)}
        if not wanted:
            continue
        copied = mixer_class(kind, config, layer).from_attention(attention, wanted, config, layer)
        if KINDS[kind].recurrent and not copy_attention:
            kept = ("attention.", "merge.") if spec.attention_heads else ()
            copied = {n: v for n, v in copied.items() if n.startswith(kept)}
        result |= {prefix + name: value for name, value in copied.items()}
    return result
