"""Between the one-stream and the two-stream form of a hybrid. Weights are shared, not copied."""

from __future__ import annotations

from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parameters import Parameters, abstract_parameters, join_model, split_model


def _rebuild(config: ModelConfig, parameters: Parameters, compute_dtype) -> Decoder:
    """The decoder of `config` from those of `parameters` that it has."""
    structure, _ = nnx.split(abstract_decoder(config, compute_dtype=compute_dtype))
    return join_model(structure, {n: parameters[n] for n in abstract_parameters(config)})


def unfuse(model: Decoder) -> Decoder:
    """Drops the teacher path: `GKA*` -> `GKA`, `*DA` -> `*`, `GDN>GKA` -> `GKA`."""
    return _rebuild(model.config.unfused(), split_model(model)[1], model.compute_dtype)


def fuse(model: Decoder, source: Decoder) -> Decoder:
    """The two-stream form: every mixer beside the source's attention, shared attention on both streams.

    Raises:
      ValueError: the two are not of one shape, or share no attention weights to teach with.
    """
    parameters = {**split_model(source)[1], **split_model(model)[1]}
    if source.config.num_layers != model.config.num_layers or source.config.is_hybrid:
        raise ValueError(f"the teacher must be the hybrid's Transformer, got pattern {source.config.pattern!r}")
    return _rebuild(model.config.fused(), parameters, model.compute_dtype)
