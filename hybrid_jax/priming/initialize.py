"""Stage 0: a hybrid from a Transformer's weights (arXiv 2605.08301, section 3)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import jax
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_choice
from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.layers import mixer_class
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import Parameters, abstract_parameters, join_model, logical_axes, marks, split_model


def _like(value, fresh):
    """Returns the value sharded as the parameter that it replaces: slices and transposes of sharded arrays end up elsewhere."""
    return value if len(fresh.sharding.device_set) == 1 else jax.device_put(value, fresh.sharding)


def _as_transformers(fresh: Parameters, stated: Mapping[str, Marks], seed: int) -> Parameters:
    """As the layers draw them: kernels N(0, initializer_range^2), biases 0."""
    return fresh


def _as_torch(fresh: Parameters, stated: Mapping[str, Marks], seed: int) -> Parameters:
    """Kernels and biases drawn again as the constructors of torch's `Linear` and `Conv1d` draw them: uniform in
    +-1/sqrt(fan_in), where the fan-in is the inputs of a linear map or the taps of a depthwise convolution."""

    def draw(name, value):
        module, _, leaf = name.rpartition(".")
        if leaf not in ("kernel", "bias"):
            return value
        taps = stated[f"{module}.kernel"].layout == "conv"
        bound = 1 / math.sqrt(fresh[f"{module}.kernel"].shape[1 if taps else 0])
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return jax.random.uniform(key, value.shape, value.dtype, -bound, bound)

    return {name: draw(name, value) for name, value in fresh.items()}


# How kernels and biases that attention does not give are drawn; decays, norms and D do not depend on it.
FRESH_PARAMETERS: dict[str, Callable[[Parameters, Mapping[str, Marks], int], Parameters]] = {
    "transformers": _as_transformers,
    "torch": _as_torch,
}


def _fresh(config: ModelConfig, dtype, seed: int, names: set[str], mesh: Mesh | None, how: str) -> Parameters:
    """Those parameters of a new decoder that `names` asks for; no others are made."""

    def make():
        new = Decoder(config, rngs=nnx.Rngs(seed), dtype=dtype)
        return FRESH_PARAMETERS[how]({n: p for n, p in split_model(new)[1].items() if n in names}, marks(new), seed)

    where = None
    if mesh is not None:
        axes, shapes = logical_axes(abstract_decoder(config)), jax.eval_shape(make)
        where = {n: parameter_sharding(mesh, n, x.shape, axes[n]) for n, x in shapes.items()}
    return jax.jit(make, out_shardings=where)()


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
    return join_model(structure, parameters | FRESH_PARAMETERS[fresh_parameters](of_mixers, marks(model), seed))


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
    check_choice("fresh_parameters", fresh_parameters, FRESH_PARAMETERS)
    config = model.config.with_pattern(pattern)
    check_convertible(model.config, config)
    _, have = split_model(model)
    dtype = have["embed_tokens.embedding"].dtype
    structure, _ = nnx.split(abstract_decoder(config, dtype=dtype, compute_dtype=model.compute_dtype))
    names = abstract_parameters(config)
    fresh = _fresh(config, dtype, seed, {n for n in names if n not in have}, mesh, fresh_parameters)
    result = {name: have[name] if name in have else fresh[name] for name in names}
    for i, layer in enumerate(config.layers):
        own = {name.removeprefix(f"layers.{i}."): v for name, v in have.items() if name.startswith(f"layers.{i}.")}
        source = {n.removeprefix("self_attn."): v for n, v in own.items() if n.startswith("self_attn.")}
        for kind in layer.kinds:
            prefix = f"layers.{i}.{KINDS[kind].parameter_key}."
            wanted = {n.removeprefix(prefix): v for n, v in fresh.items() if n.startswith(prefix)}
            if not wanted:
                continue
            copied = mixer_class(kind, config, i).from_attention(source, wanted, config, i)
            if KINDS[kind].recurrent and not copy_attention:
                kept = ("attention.", "merge.") if layer.attention_heads else ()
                copied = {n: v for n, v in copied.items() if n.startswith(kept)}
            result |= {prefix + n: _like(v.astype(dtype), wanted[n]) for n, v in copied.items()}
    return join_model(structure, result)
