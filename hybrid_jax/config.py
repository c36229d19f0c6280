"""What a model is: `ModelConfig` and the options of its mixers.

These classes and the schema (`hybrid_jax.schema`) decide whether a model is valid. Everything else may trust a
`ModelConfig` that exists. The pattern language is in `hybrid_jax.pattern`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_number
from hybrid_jax.config_parts import MoEConfig, RopeConfig
from hybrid_jax.copies import COPIES, begins_from
from hybrid_jax.iterations import Iterations, check_iterations, of_layers
from hybrid_jax.mixers import (
    ATTENTION,
    KINDS,
    BMojoConfig,
    DiscreteMamba2Config,
    GDNConfig,
    GKAConfig,
    HeadHybridConfig,
    Mamba2Config,
    Mamba3Config,
    MixerOptions,
    SWAConfig,
    options_by_key,
)  # fmt: skip
from hybrid_jax.pattern import MixerSpec, format_pattern, parse_pattern
from hybrid_jax.schema import MODEL_FIELDS, check_key, mixer_config_from_dict

__all__ = [
    "ATTENTION", "BMojoConfig", "DiscreteMamba2Config", "GDNConfig", "GKAConfig", "HeadHybridConfig", "Mamba2Config",
    "Mamba3Config", "MixerOptions", "MixerSpec", "MoEConfig", "ModelConfig", "RopeConfig", "SWAConfig", "format_pattern",
    "mixer_config_from_dict", "parse_pattern",
]  # fmt: skip

# Where norms are -> their names in a layer, as in checkpoints: in front of and behind attention, in front of and behind the MLP.
NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "behind": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "parallel": ("input_layernorm", None, None, None),  # the MLP reads what attention reads, not what it adds
}

AnyOptions = TypeVar("AnyOptions", bound=MixerOptions)


def _canonical(mixers: Sequence[MixerOptions]) -> tuple[MixerOptions, ...]:
    """Returns the options that differ from the defaults, in the order of `KINDS`, so that equal models compare equal."""
    order = list(options_by_key().values())
    for one in mixers:
        if type(one) not in order:
            raise ValueError(f"mixers: {type(one).__name__} belongs to no mixer of hybrid_jax.mixers")
    if len({type(one) for one in mixers}) < len(mixers):
        raise ValueError(f"mixers has two options of one class: {', '.join(type(one).__name__ for one in mixers)}")
    return tuple(sorted((one for one in mixers if one != type(one)()), key=lambda one: order.index(type(one))))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a decoder, whatever family it comes from.

    Args:
      family: key of `hybrid_jax.families.FAMILIES`; it decides how config.json and the tensors of a checkpoint are read
        and written, and nothing else.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP; an expert's is in `moe`. 0: no layer has an MLP, nor the norms in front of it and behind
        it (Mamba-3 language models with `d_intermediate` 0); `has_mlp` tells.
      num_heads, num_kv_heads: query heads, and key-value heads, which divide them. Mixers use the same numbers.
      head_dim: width of a head, even; it need not be hidden_size / num_heads.
      layers: one `MixerSpec` per layer (see `with_pattern`).
      rms_norm_eps: epsilon of the norms of layers, of queries and keys, and of the final norm, also where they are LayerNorms.
      rope: the rotary embedding of attention.
      window_rope: that of layers with a window of their own in `attention_windows`; None: the same (OLMo 3, Gemma 3 have two).
      max_position_embeddings: the longest document that attention is meant for, in tokens.
      tie_embeddings: the output head is the embedding table.
      qk_norm: RMSNorm over each head of queries and keys (Qwen3).
      qk_norm_all_heads: with `qk_norm`, the norm is over the channels of all heads together (OLMo 2).
      qk_norm_rotated: in layers that rotate queries and keys, each head of them is normed behind the rotation, by an RMSNorm
        without weights (Llama 4); not together with `qk_norm`.
      norms: where a layer has its norms: `before` attention and MLP, `behind` them, in front of the residual sum (OLMo 2), or in
        `both` places (Gemma 2); or `parallel`: one norm, which attention and MLP both read (Phi).
      layer_norm: the source's norms are LayerNorms with weights and biases (Phi), not RMSNorms.
      norm_offset: what is added to the weights of the source's norms (Gemma: 1).
      embedding_scale: what the embeddings are multiplied by, in the compute dtype (Gemma: sqrt(hidden_size)).
      activation: of the MLP's gate, a key of `hybrid_jax.layers.mlp.ACTIVATIONS`.
      gated_mlp: the MLP has a gate; False: it is down(activation(up(x))) (Phi).
      attention_soft_cap: c > 0: attention scores s count as c * tanh(s / c) (Gemma 2); None: as they are.
      query_pre_attn_scalar: attention scores are divided by its square root; None: by that of head_dim.
      attention_gate: attention's output is multiplied by sigmoid(g_proj x) in front of its output projection (Qwen3-Next).
      qkv_bias, o_bias, mlp_bias: biases of the projections to q, k, v (Qwen2), of attention's output projection, of the MLP.
      head_bias: the output head, which is not the embedding table, has a bias (Phi).
      attention_windows: per layer, the source's own sliding window, in keys that a query sees, or None for full attention.
      chunked_windows: the windows do not slide: of a window W a query at position p of its document sees the keys from position
        W * floor(p / W) on (Llama 4).
      rotary_layers: per layer, whether attention rotates queries and keys by their positions; empty: in every layer (SmolLM3 has
        some without).
      rotate_halves: rotary embeddings turn channels i and i + R / 2 of R rotated ones together; False: 2 i and 2 i + 1 (Llama 4).
      query_scaling: Ministral-3's (beta, original_max_position_embeddings): queries are multiplied by
        1 + beta * log(1 + floor(position / original_max_position_embeddings)).
      unrotated_query_scaling: Llama 4's (attn_scale, floor_scale): in layers without rotary embeddings queries are multiplied by
        1 + attn_scale * log(1 + floor((position + 1) / floor_scale)).
      logits_scaling: the logits are divided by this number, above 0.
      logits_soft_cap: c > 0: the logits x, after scaling, become c * tanh(x / c) (Gemma 2); None: they stay as they are.
      initializer_range: standard deviation of new kernels.
      moe: the options of a mixture of experts in every layer; None: dense.
      dense_layers: per layer, whether its MLP is dense although `moe` is given; empty: in no layer.
      source_kinds: mixers beside attention that the source family itself has; a model with them is no hybrid (Qwen3-Next: `gdn`).
      mixers: the options of mixer kinds that are not the defaults, at most one of each class (`GKAConfig(num_iter=10),
        ...`), for all layers of the kind; read them with `options`.
      gka_iterations: per layer, the iterations of its Gated KalmaNet, for inference, in place of `GKAConfig.num_iter`; None: as
        there; empty: in every layer as there. `with_iterations` sets it; it is never written to a config.json.
      extra: keys of the source's config.json that the decoder does not use (token ids and the like);
        they are written back on export and take no part in comparisons.
      stacked_experts: the files that the model was loaded from keep the experts of a layer in one tensor, and so does its export;
        it takes no part in comparisons and is not written. Families with such files only (`Family.stacked_experts`) need no mark.
      directory: where the model was loaded from, or empty; it takes no part in comparisons and is not written.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[MixerSpec, ...]
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    window_rope: RopeConfig | None = None
    max_position_embeddings: int = 32768
    tie_embeddings: bool = False
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    qk_norm_rotated: bool = False
    norms: str = "before"
    layer_norm: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    gated_mlp: bool = True
    query_pre_attn_scalar: float | None = None
    attention_soft_cap: float | None = None
    attention_gate: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    attention_windows: tuple[int | None, ...] = ()
    chunked_windows: bool = False
    rotary_layers: tuple[bool, ...] = ()
    rotate_halves: bool = True
    query_scaling: tuple[float, int] | None = None
    unrotated_query_scaling: tuple[float, int] | None = None
    logits_scaling: float = 1.0
    logits_soft_cap: float | None = None
    initializer_range: float = 0.02
    moe: MoEConfig | None = None
    dense_layers: tuple[bool, ...] = ()
    source_kinds: tuple[str, ...] = ()
    mixers: tuple[MixerOptions, ...] = ()
    gka_iterations: tuple[int | None, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    stacked_experts: bool = dataclasses.field(default=False, compare=False)
    directory: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if not self.layers:
            raise ValueError("a model needs at least one layer")
        for name, key in MODEL_FIELDS.items():
            if getattr(self, name) is None:
                raise ValueError(f"{key} must be given")
            check_key(key, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        check_choice("norms", self.norms, NORMS)
        if not self.has_mlp and self.moe is not None:
            raise ValueError("intermediate_size = 0 means layers without an MLP, but moe gives them experts; leave one of them out")
        if self.head_bias and self.tie_embeddings:
            raise ValueError("tie_word_embeddings = true is not supported where the output head has a bias; set it to false")
        for rope in filter(None, (self.rope, self.window_rope)):
            rope.check(self.head_dim)
        for name in ("logits_scaling", "embedding_scale"):
            check_number(name, getattr(self, name), above=0)
        check_number("norm_offset", self.norm_offset)
        check_choice("activation", self.activation, ("silu", "gelu_tanh"))
        for name in ("query_pre_attn_scalar", "attention_soft_cap", "logits_soft_cap"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        if self.unrotated_query_scaling is not None:
            scale, floor = self.unrotated_query_scaling
            check_number("unrotated_query_scaling[0]", scale, minimum=0)
            check_integer("unrotated_query_scaling[1]", floor, minimum=1)
        if self.qk_norm and self.qk_norm_rotated:
            raise ValueError("qk_norm and qk_norm_rotated exclude each other: queries and keys are normed once; choose one of them")
        windows = self.attention_windows or (None,) * len(self.layers)
        object.__setattr__(self, "attention_windows", tuple(check_key("attention_windows", windows)))
        rotary = self.rotary_layers or (True,) * len(self.layers)
        object.__setattr__(self, "rotary_layers", tuple(check_boolean("rotary_layers", x) for x in rotary))
        dense = self.dense_layers or (False,) * len(self.layers)
        object.__setattr__(self, "dense_layers", tuple(check_boolean("dense_layers", x) for x in dense))
        for name in ("attention_windows", "rotary_layers", "dense_layers", "gka_iterations"):
            if len(getattr(self, name)) != len(self.layers) and (name != "gka_iterations" or self.gka_iterations):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, the model has {len(self.layers)} layers")
        object.__setattr__(self, "mixers", _canonical(self.mixers))
        for cls in self.used_options():
            self.options(cls).check_heads(self.num_heads, self.num_kv_heads)
        check_iterations(self, {i: n for i, n in enumerate(self.gka_iterations) if n is not None})
        for i, layer in enumerate(self.layers):
            lacks = {"soft cap of attention scores": self.attention_soft_cap is not None, "output gate": self.attention_gate}
            for what in (name for name, has in lacks.items() if has and "bmojo" in layer.kinds):
                raise ValueError(f"layer {i}: {layer.symbol!r} has no {what}, which {self.family} has; choose another")
            own = KINDS[layer.kind].options
            if layer.attention_heads and own is not None and self.options(own).own_heads:
                raise ValueError(
                    f"layer {i}: {layer.symbol!r} keeps some heads of attention, which has {self.num_heads}, and the mixer has "
                    f"{self.options(own).own_heads} of its own; convert all heads of the layer, or none"
                )
            if layer.attention_heads and self.qk_norm_all_heads:
                raise ValueError(
                    f"layer {i}: {layer.symbol!r} keeps some heads, and {self.family} norms queries and keys over all heads "
                    "together, which some of them cannot compute; convert all heads of the layer, or none"
                )
            if wrong := [h for h in layer.attention_heads if h >= self.num_heads]:
                raise ValueError(
                    f"layer {i}: {layer.symbol!r} keeps head {wrong[0]}; the model has heads 0 to {self.num_heads - 1}"
                )

    def options(self, cls: type[AnyOptions]) -> AnyOptions:
        """Returns the options of one mixer kind, by their class: those in `mixers`, or the defaults."""
        return next((one for one in self.mixers if isinstance(one, cls)), cls())

    def with_options(self, *options: MixerOptions) -> ModelConfig:
        """Returns the same model with these options in place of its own of the same classes."""
        kept = [one for one in self.mixers if type(one) not in {type(new) for new in options}]
        return dataclasses.replace(self, mixers=(*kept, *options))

    def used_kinds(self) -> set[str]:
        """Returns the kinds of all mixers that some layer computes with, teachers and mixers inside mixers included."""
        return {kind for layer in self.layers for kind in self.kinds_in(layer)}

    def kinds_in(self, layer: MixerSpec) -> set[str]:
        """Returns the kinds of the mixers that a layer computes with, its teacher and mixers inside mixers included."""
        rows = [KINDS[kind].options for kind in layer.kinds]
        return set(layer.kinds).union(*(self.options(cls).inner for cls in rows if cls is not None))

    def used_options(self) -> set[type[MixerOptions]]:
        """Returns the classes of the options that some layer reads."""
        used = {cls for kind in self.used_kinds() if (cls := KINDS[kind].options) is not None}
        return used | {HeadHybridConfig} if any(layer.attention_heads for layer in self.layers) else used

    def solves(self, layer: int) -> bool:
        """Returns whether some mixer of layer number `layer` is Gated KalmaNet, or has one inside."""
        return "gka" in self.kinds_in(self.layers[layer])

    def iterations_of(self, layer: int) -> int:
        """Returns the iterations of Gated KalmaNet in layer number `layer`, counted as `GKAConfig.num_iter` counts them."""
        own = self.gka_iterations[layer] if self.gka_iterations else None
        return self.options(GKAConfig).num_iter if own is None else own

    def with_iterations(self, iterations: Iterations | None) -> ModelConfig:
        """Returns the same model with other iterations of Gated KalmaNet, for inference; see `hybrid_jax.with_iterations`.

        Raises:
          ValueError: see there.
        """
        return dataclasses.replace(self, gka_iterations=of_layers(self, iterations))

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Returns the rotary embedding of the attention in layer number `layer`; None: it has none."""
        if not self.rotary_layers[layer]:
            return None
        return self.rope if self.window_rope is None or self.attention_windows[layer] is None else self.window_rope

    def norms_queries(self, layer: int) -> bool:
        """Returns whether the attention in layer number `layer` norms queries and keys, with weights or without."""
        return self.qk_norm or (self.qk_norm_rotated and self.rotary_layers[layer])

    def chunk_of(self, layer: int) -> int | None:
        """Returns the tokens of the chunks of a document which attention in layer number `layer` stays within; None: no chunks."""
        return self.attention_windows[layer] if self.chunked_windows else None

    def check_cache(self, length: int) -> None:
        """Checks that documents of `length` tokens can be decoded with caches.

        Raises:
          ValueError: some attention has LongRoPE, and the documents may grow beyond its original context: the keys of all tokens
            would have to be rotated again.
        """
        for i, layer in enumerate(self.layers):
            rope = self.rope_of(i)
            if layer.attends and rope is not None and rope.kind == "longrope":
                context = rope.option("original_max_position_embeddings")
                if length > context:
                    raise ValueError(
                        f"longrope: a document that grows beyond original_max_position_embeddings, {context} tokens, gets other "
                        f"frequencies, which cached keys cannot follow; decoding with room for {length} tokens is not supported, "
                        f"give at most {context}"
                    )

    @property
    def programs(self) -> list[tuple[MixerSpec, int | None, RopeConfig | None, bool, int | None]]:
        """Per layer, what its computation depends on beside its parameters: layers that are equal here may share one program."""
        own = self.gka_iterations or (None,) * len(self.layers)
        by_layer = enumerate(zip(self.layers, self.attention_windows, self.dense_layers, own, strict=True))
        return [(spec, window, self.rope_of(i), dense, n) for i, (spec, window, dense, n) in by_layer]

    @property
    def has_mlp(self) -> bool:
        """Whether layers have an MLP behind their mixer, or beside it; all of them have one, or none."""
        return self.intermediate_size > 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def pattern(self) -> str:
        return format_pattern(self.layers)

    @property
    def is_hybrid(self) -> bool:
        return not {MixerSpec(kind) for kind in (ATTENTION, *self.source_kinds)}.issuperset(self.layers)

    @property
    def is_fused(self) -> bool:
        return any(layer.fused for layer in self.layers)

    def with_pattern(self, pattern: str | Sequence[MixerSpec]) -> ModelConfig:
        """The same model with other mixers. One that begins from a layer's own mixer (`copies.COPIES`) takes over its options.

        Iterations for inference (`with_iterations`) stay where a layer has Gated KalmaNet in both.

        Raises:
          ValueError: the pattern is invalid or has a wrong length, or options cannot be taken over.
        """
        layers = parse_pattern(pattern, self.num_layers) if isinstance(pattern, str) else tuple(pattern)
        if len(layers) != self.num_layers:
            raise ValueError(f"the pattern has {len(layers)} layers, the model has {self.num_layers}")
        copied = {(begins_from(old, kind), kind) for old, new in zip(self.layers, layers, strict=True) for kind in new.kinds}
        taken = [COPIES[x].options(self.options, fixed=x[1] in self.used_kinds()) for x in sorted(COPIES.keys() & copied)]
        made = dataclasses.replace(self.with_options(*taken), layers=layers, gka_iterations=())
        return made.with_iterations({i: n for i, n in enumerate(self.gka_iterations) if n is not None and made.solves(i)} or None)

    def fused(self, source: ModelConfig | None = None) -> ModelConfig:
        """The two-stream form: mixers beside the mixer they replace; attention and `source_kinds` on both streams.

        Args:
          source: what was converted, where a mixer may have begun from another one (`copies.COPIES`), from which it then learns;
            None: every mixer learns from attention.
        """
        teachers = {kind: kind for kind in self.source_kinds}
        begun = {} if source is None else dict(enumerate(source.teacher().layers))

        def taught(i: int, layer: MixerSpec) -> MixerSpec:
            own = begun.get(i, layer).kind
            return layer.fused_with(own if (own, layer.kind) in COPIES else teachers.get(layer.kind, ATTENTION))

        return self.with_pattern([s if s.fused else taught(i, s) for i, s in enumerate(self.layers)])

    def unfused(self) -> ModelConfig:
        """The one-stream form: teachers dropped."""
        return self.with_pattern([s.unfused() for s in self.layers])

    def teacher(self) -> ModelConfig:
        """The one-stream form of the teacher stream; of a model that is not fused, the model itself."""
        return self.with_pattern([MixerSpec(s.teaching) for s in self.layers])
