"""The decoder: one for every family and every pattern, with the two-stream (fused) forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import PARAMETER_KEYS, ModelConfig
from hybrid_jax.layers import MLP, Embedding, Linear, MoE, RMSNorm, make_mixer


def positions_of(segment_ids):
    """[B,T] positions that restart at 0 where the segment id changes."""
    B, T = segment_ids.shape
    index = jnp.arange(T, dtype=jnp.int32)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


class LayerOutputs(NamedTuple):
    """One stream's way through one layer, each [B,T,hidden]."""

    mixer: jax.Array
    mlp: jax.Array
    hidden: jax.Array


class TwoStreams(NamedTuple):
    """A fused model's forward: per layer (teacher, student) outputs, and both final normed states."""

    layers: tuple[tuple[LayerOutputs, LayerOutputs], ...]
    teacher: jax.Array
    student: jax.Array


class Layer(nnx.Module):
    """h + mixer(norm h), then h + mlp(norm h). A fused layer holds teacher and student mixers."""

    def __init__(self, config: ModelConfig, index: int, *, rngs, dtype=jnp.float32):
        self.spec = config.layers[index]
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        for kind in self.spec.kinds:
            setattr(self, PARAMETER_KEYS[kind], make_mixer(kind, config, index, rngs=rngs, dtype=dtype))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = (MLP if config.moe is None else MoE)(config, rngs=rngs, dtype=dtype)

    def mixer(self, kind: str):
        return getattr(self, PARAMETER_KEYS[kind])

    def run(self, kind, hidden, *, positions, segment_ids, state=None) -> tuple[LayerOutputs, Any]:
        """The layer with its mixer of `kind`."""
        mixed, state = self.mixer(kind)(self.input_layernorm(hidden), positions=positions, segment_ids=segment_ids, state=state)
        hidden = hidden + mixed
        out = self.mlp(self.post_attention_layernorm(hidden))
        return LayerOutputs(mixed, out, hidden + out), state


class Decoder(nnx.Module):
    """A causal language model of attention and recurrent layers.

    Args:
      config: what it is.
      dtype: of the parameters.
      compute_dtype: of activations; default: the parameters'.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, compute_dtype=None):
        self.config, self.compute_dtype = config, jnp.dtype(compute_dtype or dtype)
        std = config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=std, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            head = dict(axes=("embed", "vocab"), std=std, rngs=rngs, dtype=dtype)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, **head)

    def _inputs(self, input_ids, segment_ids, positions):
        if segment_ids is None:
            segment_ids = jnp.ones(input_ids.shape, jnp.int32)
        if positions is None:
            positions = positions_of(segment_ids)
        return self.embed_tokens(input_ids, self.compute_dtype), dict(positions=positions, segment_ids=segment_ids)

    def hidden_states(self, input_ids, segment_ids=None, positions=None, state=None):
        """[B,T] ids -> (final normed hidden [B,T,hidden], state); a fused model runs its student."""
        hidden, at = self._inputs(input_ids, segment_ids, positions)
        states = []
        for i, layer in enumerate(self.layers):
            out, s = layer.run(layer.spec.kind, hidden, **at, state=None if state is None else state[i])
            hidden = out.hidden
            states.append(s)
        return self.norm(hidden), (None if state is None else tuple(states))

    def two_streams(self, input_ids, segment_ids=None, positions=None) -> TwoStreams:
        """Teacher and student through a fused model; the student never sees the teacher's states.

        Until the first layer whose mixers differ the streams are equal, and are computed once.

        Raises:
          ValueError: a layer has no teacher.
        """
        bare = [i for i, layer in enumerate(self.layers) if not layer.spec.fused]
        if bare:
            raise ValueError(f"layer {bare[0]} ({self.layers[bare[0]].spec.symbol!r}) has no teacher; fuse the model first")
        teacher, at = self._inputs(input_ids, segment_ids, positions)
        student, parted, layers = teacher, False, []
        for layer in self.layers:
            t, _ = layer.run(layer.spec.teacher, teacher, **at)
            parted = parted or not layer.spec.shared
            s = layer.run(layer.spec.kind, student, **at)[0] if parted else t
            teacher, student = t.hidden, s.hidden
            layers.append((t, s))
        return TwoStreams(tuple(layers), self.norm(teacher), self.norm(student))

    def head(self, hidden):
        """Final hidden states -> logits [..., vocab], in the compute dtype."""
        return self.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)

    def __call__(self, input_ids, segment_ids=None, positions=None):
        """Logits [B,T,vocab] of input_ids [B,T]; segment ids pack several sequences in a row, 0 is padding."""
        return self.head(self.hidden_states(input_ids, segment_ids, positions)[0])

    def init_state(self, batch: int, max_length: int):
        """Empty caches and recurrent states for generating up to `max_length` tokens a row."""
        return tuple(layer.mixer(layer.spec.kind).init_state(batch, max_length, self.compute_dtype) for layer in self.layers)


def abstract_decoder(config: ModelConfig, dtype=jnp.float32, compute_dtype=None) -> Decoder:
    """The decoder's shapes without its arrays."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, compute_dtype=compute_dtype))


__all__ = ["Decoder", "LayerOutputs", "TwoStreams", "abstract_decoder", "positions_of"]
