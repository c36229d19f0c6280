"""Between the one-stream and the two-stream form of a hybrid, and who its teacher is. Weights are shared, not copied."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parameters import Parameters, abstract_parameters, join_model, marks, split_model


def _rebuild(config: ModelConfig, parameters: Parameters, compute_dtype) -> Decoder:
    """The decoder of `config` from those of `parameters` that it has."""
    structure, _ = nnx.split(abstract_decoder(config, compute_dtype=compute_dtype))
    return join_model(structure, {n: parameters[n] for n in abstract_parameters(config)})


def unfuse(model: Decoder) -> Decoder:
    """Drops the teacher path: `GKA*` -> `GKA`, `*DA` -> `*`, `GDN>GKA` -> `GKA`."""
    return _rebuild(model.config.unfused(), split_model(model)[1], model.compute_dtype)


def fuse(model: Decoder, source: Decoder) -> Decoder:
    """The two-stream form: every mixer beside the source's attention, or beside the mixer from which it began; shared attention on
    both streams.

    Its teacher stream is the source only while the parameters that both streams read are the source's; training takes
    the source itself as the teacher.

    Raises:
      ValueError: the source cannot be the teacher (see `check_teacher`).
    """
    fused = model.config.fused(source.config)
    check_teacher(fused, source.config)
    return _rebuild(fused, {**split_model(source)[1], **split_model(model)[1]}, model.compute_dtype)


def check_teacher(fused: ModelConfig, source: ModelConfig) -> None:
    """Checks that the source can teach a fused model: every layer's teacher is the source's own mixer.

    Raises:
      ValueError: it cannot; names the first layer, or the first size, that differs.
    """
    taught, teacher = fused.teacher(), source.teacher()
    if taught.num_layers != teacher.num_layers:
        raise ValueError(f"the teacher must have the model's {taught.num_layers} layers, it has {teacher.num_layers}")
    for i, (wanted, found) in enumerate(zip(taught.layers, teacher.layers, strict=True)):
        if wanted != found:
            raise ValueError(
                f"layer {i} of the fused model is {fused.layers[i].symbol!r}: it learns from {wanted.symbol!r}, the source has "
                f"{found.symbol!r} there. The teacher must be the source itself; take a Transformer as source, or another form"
            )
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "attention_windows", "chunked_windows", "rotary_layers", "norms", "qk_norm_all_heads"):
        wanted, found = getattr(taught, name), getattr(teacher, name)
        if wanted != found:
            raise ValueError(f"the teacher's {name} is {found!r}, the model's is {wanted!r}")


def teacher_stream(model: Decoder) -> Decoder:
    """The teacher stream of a fused model as a model of one stream, with the same arrays."""
    return _rebuild(model.config.teacher(), split_model(model)[1], model.compute_dtype)


def same_function(one: ModelConfig, other: ModelConfig) -> bool:
    """Returns whether two models with equal parameters compute the same; options of mixers that neither has do not count."""
    used = one.used_options() | other.used_options()

    def only_used(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, mixers=tuple(options for options in config.mixers if type(options) in used))

    return only_used(one) == only_used(other)


def share(teacher: Decoder, model: Decoder, dtype: str = "") -> Decoder:
    """The teacher with the model's own arrays in place of those of its own that equal them.

    Args:
      dtype: in which parameters marked `frozen` are compared; empty: their own.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def equal(a: jax.Array, b: jax.Array, rounded: bool) -> jax.Array:
        low = (lambda x: x.astype(dtype)) if rounded else (lambda x: x)
        return jnp.array_equal(low(a), low(b))

    own, stated = split_model(model)[1], marks(teacher)
    structure, parameters = split_model(teacher)

    def same(name: str) -> bool:
        a, b = parameters[name], own.get(name)
        return a is b or b is not None and bool(whole_array(equal(a, b, bool(dtype) and stated[name].frozen)))

    return join_model(structure, {n: own[n] if same(n) else x for n, x in parameters.items()})
