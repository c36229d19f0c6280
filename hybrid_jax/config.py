"""What a model is: `ModelConfig` and the options of its mixers.

These classes and the schema (`hybrid_jax.schema`) decide whether a model is valid. Everything else may trust a
`ModelConfig` that exists. The pattern language is in `hybrid_jax.pattern`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from hybrid_jax.checks import check_boolean, check_choice, check_number
from hybrid_jax.copies import COPIES, begins_from
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
from hybrid_jax.options import Options, option, optional
from hybrid_jax.pattern import MixerSpec, format_pattern, parse_pattern
from hybrid_jax.schema import KEYS, MODEL_FIELDS, check_key, check_rope, mixer_config_from_dict

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


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: transformers' `rope_parameters`.

    Args:
      theta: base of the frequencies.
      kind: `default`, `linear`, `llama3`, `yarn` or `longrope`.
      options: the other keys of `rope_parameters`, sorted pairs.
    """

    theta: float = 10_000.0
    kind: str = "default"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        check_key("rope_theta", self.theta)
        check_rope(self.kind, dict(self.options))

    def option(self, name: str, default: Any = None) -> Any:
        """Returns the value of an option, or the default where it is absent."""
        return dict(self.options).get(name, default)

    def number(self, name: str) -> float:
        """Returns the value of an option that this kind must have; `check_rope` has seen it."""
        return dict(self.options)[name]

    def channels(self, head_dim: int) -> int:
        """Returns how many channels of a head are rotated, its first ones: all, or the share `partial_rotary_factor`."""
        return int(head_dim * self.option("partial_rotary_factor", 1.0))

    def check(self, head_dim: int) -> None:
        """Checks that the embedding fits heads of `head_dim`.

        Raises:
          ValueError: it rotates an odd number of channels, or none, or a list of LongRoPE's factors is not half as long.
        """
        channels = self.channels(head_dim)
        if channels % 2 or not channels:
            raise ValueError(
                f"partial_rotary_factor {self.option('partial_rotary_factor')!r} rotates {channels} of {head_dim} channels; choose "
                "one that rotates an even number of them"
            )
        for name in ("short_factor", "long_factor"):
            factors = self.option(name)
            if self.kind == "longrope" and len(factors) != channels // 2:
                raise ValueError(
                    f"rope_parameters.{name} must have {channels // 2} entries, one for each pair of rotated channels, got "
                    f"{len(factors)}"
                )


@dataclasses.dataclass(frozen=True)
class MoEConfig(Options):
    """Options of a mixture-of-experts MLP: softmax router, top-k experts, and a shared expert or none.

    All of them belong to the source model, so a hybrid keeps them as they are.

    Args:
      num_experts: number of expert MLPs per layer.
      experts_per_token: how many experts process each token: those with the largest router probabilities.
      intermediate_size: hidden width of each expert.
      norm_topk_prob: rescale the router probabilities of the chosen experts so that they sum to one.
      shared_intermediate_size: hidden width of a shared expert, whose output counts sigmoid(w x) times (Qwen3-Next); None: no such.
    """

    KEY: ClassVar[str] = "moe"

    num_experts: int = option(KEYS["num_experts"])
    experts_per_token: int = option(KEYS["num_experts_per_tok"])
    intermediate_size: int = option(KEYS["moe_intermediate_size"])
    norm_topk_prob: bool = option(check_boolean, True)
    shared_intermediate_size: int | None = option(optional(KEYS["shared_expert_intermediate_size"]), None)

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"num_experts_per_tok must be at most num_experts ({self.num_experts}), got {self.experts_per_token}")


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
      intermediate_size: width of the MLP; an expert's is in `moe`.
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
      rotary_layers: per layer, whether attention rotates queries and keys by their positions; empty: in every layer (SmolLM3 has
        some without).
      query_scaling: Ministral-3's (beta, original_max_position_embeddings): queries are multiplied by
        1 + beta * log(1 + floor(position / original_max_position_embeddings)).
      logits_scaling: the logits are divided by this number, above 0.
      logits_soft_cap: c > 0: the logits x, after scaling, become c * tanh(x / c) (Gemma 2); None: they stay as they are.
      initializer_range: standard deviation of new kernels.
      moe: the options of a mixture of experts in every layer; None: dense.
      dense_layers: per layer, whether its MLP is dense although `moe` is given; empty: in no layer.
      source_kinds: mixers beside attention that the source family itself has; a model with them is no hybrid (Qwen3-Next: `gdn`).
      mixers: the options of mixer kinds that are not the defaults, at most one of each class (`GKAConfig(num_iter=10),
        ...`), for all layers of the kind; read them with `options`.
      extra: keys of the source's config.json that the decoder does not use (token ids and the like);
        they are written back on export and take no part in comparisons.
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
    rotary_layers: tuple[bool, ...] = ()
    query_scaling: tuple[float, int] | None = None
    logits_scaling: float = 1.0
    logits_soft_cap: float | None = None
    initializer_range: float = 0.02
    moe: MoEConfig | None = None
    dense_layers: tuple[bool, ...] = ()
    source_kinds: tuple[str, ...] = ()
    mixers: tuple[MixerOptions, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
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
        windows = self.attention_windows or (None,) * len(self.layers)
        object.__setattr__(self, "attention_windows", tuple(check_key("attention_windows", windows)))
        rotary = self.rotary_layers or (True,) * len(self.layers)
        object.__setattr__(self, "rotary_layers", tuple(check_boolean("rotary_layers", x) for x in rotary))
        dense = self.dense_layers or (False,) * len(self.layers)
        object.__setattr__(self, "dense_layers", tuple(check_boolean("dense_layers", x) for x in dense))
        for name in ("attention_windows", "rotary_layers", "dense_layers"):
            if len(getattr(self, name)) != len(self.layers):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, the model has {len(self.layers)} layers")
        object.__setattr__(self, "mixers", _canonical(self.mixers))
        for cls in self.used_options():
            self.options(cls).check_heads(self.num_heads, self.num_kv_heads)
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
        used = {kind for layer in self.layers for kind in layer.kinds}
        rows = [KINDS[kind].options for kind in used]
        return used.union(*(self.options(cls).inner for cls in rows if cls is not None))

    def used_options(self) -> set[type[MixerOptions]]:
        """Returns the classes of the options that some layer reads."""
        used = {cls for kind in self.used_kinds() if (cls := KINDS[kind].options) is not None}
        return used | {HeadHybridConfig} if any(layer.attention_heads for layer in self.layers) else used

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Returns the rotary embedding of the attention in layer number `layer`; None: it has none."""
        if not self.rotary_layers[layer]:
            return None
        return self.rope if self.window_rope is None or self.attention_windows[layer] is None else self.window_rope

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
    def programs(self) -> list[tuple[MixerSpec, int | None, RopeConfig | None, bool]]:
        """Per layer, what its computation depends on beside its parameters: layers that are equal here may share one program."""
        of_layers = enumerate(zip(self.layers, self.attention_windows, self.dense_layers, strict=True))
        return [(spec, window, self.rope_of(i), dense) for i, (spec, window, dense) in of_layers]

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

        Raises:
          ValueError: the pattern is invalid or has a wrong length, or options cannot be taken over.
        """
        layers = parse_pattern(pattern, self.num_layers) if isinstance(pattern, str) else tuple(pattern)
        if len(layers) != self.num_layers:
            raise ValueError(f"the pattern has {len(layers)} layers, the model has {self.num_layers}")
        copied = {(begins_from(old, kind), kind) for old, new in zip(self.layers, layers, strict=True) for kind in new.kinds}
        taken = [COPIES[x].options(self.options, fixed=x[1] in self.used_kinds()) for x in sorted(COPIES.keys() & copied)]
        return dataclasses.replace(self.with_options(*taken), layers=layers)

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
