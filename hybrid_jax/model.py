"""The decoder: one for every family and every pattern, with the two-stream (fused) forward."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import NORMS, ModelConfig
from hybrid_jax.layers import MLP, Embedding, Linear, MoE, make_mixer, source_norm
from hybrid_jax.layers.parameter import marks_of
from hybrid_jax.mixers import KINDS
from hybrid_jax.parallel import attention
from hybrid_jax.parallel.head import Head
from hybrid_jax.parallel.sequence import positions_of
from hybrid_jax.parallel.sharding import TOKENS, axis_size, constrain, gathered
from hybrid_jax.repeats import Repeat, find_repeats

# What a layer keeps for its gradient -> the policy: everything, its attention's outputs, or only its input.
REMAT = {
    "none": None,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerOutputs(NamedTuple):
    """One stream's way through one layer, each [B,T,hidden]; `mlp` is zero in a layer without an MLP."""

    mixer: jax.Array
    mlp: jax.Array
    hidden: jax.Array


class TwoStreams(NamedTuple):
    """A fused model's forward: what `compare` made of each layer's two outputs, and both final normed states."""

    layers: tuple
    teacher: jax.Array
    student: jax.Array


class Layer(nnx.Module):
    """h + mixer(norm h), then h + mlp(norm h), with norms where `config.norms` says; `parallel`: h + mixer(norm h) + mlp(norm h).

    Where `config.has_mlp` is false a layer is h + mixer(norm h). A fused layer holds teacher and student.
    """

    def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        norms, dense = NORMS[config.norms], config.moe is None or config.dense_layers[index]
        self.spec, self.parallel = config.layers[index], config.norms == "parallel"
        self.norms = norms if config.has_mlp else (*norms[:2], None, None)
        for name in self.norms:
            if name is not None:
                setattr(self, name, source_norm(config, config.hidden_size, dtype))
        for kind in self.spec.kinds:
            setattr(self, KINDS[kind].parameter_key, make_mixer(kind, config, index, rngs=rngs, dtype=dtype))
        self.mlp = (MLP if dense else MoE)(config, rngs=rngs, dtype=dtype) if config.has_mlp else None

    def mixer(self, kind: str) -> Any:
        return getattr(self, KINDS[kind].parameter_key)

    def _normed(self, place: int, x: jax.Array) -> jax.Array:
        """Returns x behind the norm in one of the four places, or x where there is none."""
        name = self.norms[place]
        return x if name is None else getattr(self, name)(x)

    def mixer_input(self, hidden: jax.Array) -> jax.Array:
        """Returns what the mixers of the layer read of its input [B, T, hidden]."""
        return self._normed(0, hidden)

    def run(
        self, kind: str, hidden: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: Any = None
    ) -> tuple[LayerOutputs, Any]:
        """The layer with its mixer of `kind`."""
        mixed, state = self.mixer(kind)(self.mixer_input(hidden), positions=positions, segment_ids=segment_ids, state=state)
        return self.behind_mixer(hidden, mixed), state

    def mlp_input(self, hidden: jax.Array, mixed: jax.Array) -> jax.Array:
        """Returns what the MLP of the layer reads, of the layer's input and its mixer's output [B, T, hidden]."""
        return self.mixer_input(hidden) if self.parallel else self._normed(2, hidden + self._normed(1, mixed))

    def behind_mixer(self, hidden: jax.Array, mixed: jax.Array) -> LayerOutputs:
        """The rest of the layer, of its input and its mixer's output; `LayerOutputs` has what is added to the residual stream."""
        if self.parallel and self.mlp is not None:
            out = self.mlp(self.mixer_input(hidden))
            return LayerOutputs(mixed, out, constrain(hidden + mixed + out, *TOKENS))
        mixed = self._normed(1, mixed)
        hidden = constrain(hidden + mixed, *TOKENS)
        if self.mlp is None:
            return LayerOutputs(mixed, jnp.zeros_like(mixed), hidden)
        out = self._normed(3, self.mlp(self._normed(2, hidden)))
        return LayerOutputs(mixed, out, constrain(hidden + out, *TOKENS))


def _stack_states(states):
    return states[0] if len(states) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *states)


class Decoder(nnx.Module):
    """A causal language model of attention and recurrent layers.

    Args:
      config: what it is.
      dtype: of the parameters.
      compute_dtype: of activations; default: the parameters'.

    `remat` (a key of `REMAT`) says what a layer keeps for its gradient; `scan` whether layers that repeat are
    compiled once; `repeats` is set where `layers` holds one layer for many, with stacked parameters (`stacking`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, compute_dtype: Any = None):
        self.config, self.compute_dtype = config, jnp.dtype(compute_dtype or dtype)
        self.remat, self.scan = "none", True
        self.repeats: tuple[Repeat, ...] | None = None
        std = config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=std, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)])
        self.norm = source_norm(config, config.hidden_size, dtype)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            head: dict[str, Any] = dict(bias=config.head_bias, axes=("embed", "vocab"), muon=False, std=std, rngs=rngs, dtype=dtype)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, **head)

    def inputs(
        self, input_ids: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """What the layers take: the embeddings [B,T,hidden], and {positions, segment_ids}."""
        input_ids = jnp.asarray(input_ids)
        if segment_ids is None:
            segment_ids = jnp.ones(input_ids.shape, jnp.int32)
        if positions is None:
            if axis_size("seq") > 1:
                raise ValueError("where tokens are sharded over the mesh (zig-zag order) the model needs their positions")
            positions = positions_of(segment_ids)
        hidden = constrain(self.embed_tokens(input_ids, self.compute_dtype), *TOKENS)
        if self.config.embedding_scale != 1:
            hidden = hidden * jnp.asarray(self.config.embedding_scale, hidden.dtype)
        return hidden, dict(positions=positions, segment_ids=segment_ids)

    def through_layers(self, run_layer: Callable, carry: Any, *others: Decoder) -> tuple[Any, list[Any]]:
        """carry -> run_layer(layer, *others' layers, carry) -> (carry, out) through all layers; the outs in a list, one per layer.

        Layers that repeat are scanned: compiled once, however many. Their parameters come stacked (`stacking`) or
        are stacked here. The others have as many layers, stacked in the same repeats.
        """
        models = (self, *others)
        if self.repeats is not None:
            repeats = self.repeats
            bodies = zip(*(model.layers for model in models), strict=True)
        else:
            keys = list(zip(*(m.config.programs for m in models), strict=True))
            repeats = find_repeats(keys) if self.scan else [Repeat(i, 1, 1) for i in range(len(keys))]

        def unit(graphs, states, carry):
            outs = []
            for graph, state in zip(graphs, states, strict=True):
                step = functools.partial(self._run_merged, run_layer, graph)
                if self.remat != "none":
                    # In a scan nothing can merge a recomputed value with the first one, which is in another loop. Layers that are
                    # not scanned have no such border, but XLA's CPU compiler keeps as much memory with True as with False, scanned
                    # or not (8 layers, `none`, `attention` and `full`).
                    step = jax.checkpoint(step, policy=REMAT[self.remat], prevent_cse=False)
                carry, out = step(state, carry)
                outs.append(out)
            return carry, outs

        def unit_of(repeat):
            """The graphs of each layer of the unit, of each model, and their states, stacked where the run repeats."""
            if self.repeats is not None:
                split = [[nnx.split(layer) for layer in next(bodies)] for _ in range(repeat.length)]
                return [[g for g, _ in layers] for layers in split], [[s for _, s in layers] for layers in split]
            split = [[[nnx.split(m.layers[i]) for i in place] for m in models] for place in repeat.places]
            graphs = [[layers[0][0] for layers in of_models] for of_models in split]
            return graphs, [[_stack_states([s for _, s in layers]) for layers in of_models] for of_models in split]

        outs = []
        for repeat in repeats:
            graphs, states = unit_of(repeat)
            if repeat.count == 1:
                carry, out = unit(graphs, states, carry)
                outs += out
                continue
            carry, out = jax.lax.scan(lambda c, s, graphs=graphs: unit(graphs, s, c), carry, states)
            # The scan stacks what every layer returns. Indexing it back is cheap: XLA fuses the slice into what reads it, and
            # removes outputs that nobody reads. It is small (losses per token), unless the caller asks for hidden states.
            outs += [jax.tree.map(lambda x, n=n: x[n], out[m]) for n in range(repeat.count) for m in range(repeat.length)]
        return carry, outs

    def _run_merged(self, run_layer, graphs, states, carry):
        layers = [nnx.merge(graph, self._computed(state)) for graph, state in zip(graphs, states, strict=True)]
        return run_layer(*layers, carry)

    def _computed(self, state: nnx.State) -> nnx.State:
        """Returns a layer's parameters as it computes with them: those marked `compute` are cast and then all-gathered."""
        flat = []
        for path, variable in nnx.to_flat_state(state):
            x = variable[...]
            marks = marks_of(variable)
            if marks.compute:
                x = gathered(x.astype(self.compute_dtype), marks.axes)
            flat.append((path, variable.replace(x)))
        return nnx.from_flat_state(flat)

    def hidden_states(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        state: Any = None,
        stream: str = "student",
    ) -> tuple[jax.Array, Any]:
        """[B,T] ids -> (final normed hidden [B,T,hidden], state).

        Args:
          stream: of a fused model, `student` or (without a state) `teacher`, with this model's own parameters.
        """
        hidden, at = self.inputs(input_ids, segment_ids, positions)
        if state is None:

            def run(layer, h):
                kind = layer.spec.teaching if stream == "teacher" else layer.spec.kind
                return layer.run(kind, h, **at)[0].hidden, None

            hidden, _ = self.through_layers(run, hidden)
            return self.norm(hidden), None
        states = []
        for layer, s in zip(self.layers, state, strict=True):
            out, s = layer.run(layer.spec.kind, hidden, **at, state=s)
            hidden = out.hidden
            states.append(s)
        return self.norm(hidden), tuple(states)

    def two_streams(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        compare: Callable = lambda teacher, student: (teacher, student),
        teacher: Decoder | None = None,
        layerwise: bool = False,
    ) -> TwoStreams:
        """Teacher and student through a fused model.

        The student never sees the teacher's states, unless `layerwise`: then every layer of the student reads what the teacher's
        layer reads, so that layers can be compared one by one, and `student` is the last layer's output alone.

        Args:
          compare: (teacher's, student's `LayerOutputs`) -> what is kept of a layer; default: both.
          teacher: a model with as many layers whose parameters, RoPE and embeddings the teacher stream has; default: this
            model's own.

        Raises:
          ValueError: a layer has no teacher.
        """
        bare = [(i, spec.symbol) for i, spec in enumerate(self.config.layers) if not spec.fused]
        if bare:
            raise ValueError(f"layer {bare[0][0]} ({bare[0][1]!r}) has no teacher; fuse the model first")
        hidden, at = self.inputs(input_ids, segment_ids, positions)
        others = () if teacher is None else (teacher,)
        start = hidden if teacher is None else teacher.inputs(input_ids, segment_ids, positions)[0]

        def both(layer, *rest):
            (taught, student), other = rest[-1], rest[0] if others else layer
            t, _ = other.run(other.spec.teaching, taught, **at)
            s, _ = layer.run(layer.spec.kind, jax.lax.stop_gradient(taught) if layerwise else student, **at)
            return (t.hidden, s.hidden), compare(t, s)

        (taught, student), layers = self.through_layers(both, (start, hidden), *others)
        return TwoStreams(tuple(layers), (teacher or self).norm(taught), self.norm(student))

    def mixers_of_layers(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        compare: Callable,
        teacher: Decoder | None = None,
    ) -> list[Any]:
        """Runs the teacher stream of a fused model and shows the mixers of every layer what the teacher's layer reads.

        Args:
          compare: ((the teacher's mixer, its input), (the student's, its input), whether they are one, {positions, segment_ids}) ->
            what is kept of a layer; the inputs are [B, T, hidden] and take no gradient.
          teacher: as in `two_streams`.
        """
        others = () if teacher is None else (teacher,)
        start, at = (teacher or self).inputs(input_ids, segment_ids, positions)

        def run(layer, *rest):
            hidden, other = rest[-1], rest[0] if others else layer
            hidden, kinds = jax.lax.stop_gradient(hidden), (other.spec.teaching, layer.spec.kind)
            taught, student = ((x.mixer(kind), x.mixer_input(hidden)) for x, kind in zip((other, layer), kinds, strict=True))
            kept = compare(taught, student, layer.spec.shared, at)
            return other.run(kinds[0], hidden, **at)[0].hidden, kept

        return self.through_layers(run, start, *others)[1]

    @property
    def head(self) -> Head:
        """The output head, a function of the final normed states [..., hidden] that returns the logits [..., vocab] in float32."""
        options = (self.config.logits_scaling, self.config.logits_soft_cap)
        if self.lm_head is None:
            return Head(self.embed_tokens.embedding[...].T, *options)
        return Head(self.lm_head.kernel[...], *options, None if self.lm_head.bias is None else self.lm_head.bias[...])

    def __call__(self, input_ids: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None) -> jax.Array:
        """Logits [B,T,vocab] of input_ids [B,T]; segment ids pack several sequences in a row, 0 is padding."""
        return self.head(self.hidden_states(input_ids, segment_ids, positions)[0])

    def init_state(self, batch: int, max_length: int) -> Any:
        """Empty caches and recurrent states for generating up to `max_length` tokens per row.

        Raises:
          ValueError: an attention cannot be decoded to this length (`ModelConfig.check_cache`).
        """
        self.config.check_cache(max_length)
        return self.empty_state(batch, max_length)

    def empty_state(self, batch: int, max_length: int) -> Any:
        """Returns what `init_state` returns, also where decoding is not supported: its sizes are what planning asks for."""
        return tuple(layer.mixer(layer.spec.kind).init_state(batch, max_length, self.compute_dtype) for layer in self.layers)

    def state_axes(self) -> Any:
        """The logical axes of every array of `init_state`, in its structure."""
        return tuple(layer.mixer(layer.spec.kind).state_axes() for layer in self.layers)


def abstract_decoder(config: ModelConfig, dtype: Any = jnp.float32, compute_dtype: Any = None) -> Decoder:
    """The decoder's shapes without its arrays."""

    def make():
        key = jax.random.key(0)  # one for all: nothing is drawn, and drawing keys is most of the time this takes
        rngs: Any = types.SimpleNamespace(params=lambda: key)
        return Decoder(config, rngs=rngs, dtype=dtype, compute_dtype=compute_dtype)

    return nnx.eval_shape(make)


__all__ = ["Decoder", "LayerOutputs", "TwoStreams", "abstract_decoder"]
