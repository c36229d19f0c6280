"""What a model is: `ModelConfig` and the options of its mixers.

These classes and the schema (`hybrid_jax.schema`) decide whether a model is valid. Everything else may trust a
`ModelConfig` that exists. The pattern language is in `hybrid_jax.pattern`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hybrid_jax.pattern import ATTENTION, NOT_BUILT, PARAMETER_KEYS, SYMBOLS, MixerSpec, format_pattern, parse_pattern
from hybrid_jax.schema import FIXED, FREE, MODEL_FIELDS, OPTIONS, REPEATED, check_key, check_rope

__all__ = [
    "ATTENTION", "MIXER_CONFIGS", "NOT_BUILT", "PARAMETER_KEYS", "SYMBOLS", "BMojoConfig", "GDNConfig", "GKAConfig",
    "Mamba2Config", "MixerSpec", "MoEConfig", "ModelConfig", "RopeConfig", "SWAConfig", "format_pattern",
    "mixer_config_from_dict", "parse_pattern",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: transformers' `rope_parameters`.

    Args:
      theta: base of the frequencies.
      kind: `default`, `linear`, `llama3` or `yarn`.
      options: the other keys of `rope_parameters`, sorted pairs.
    """

    theta: float = 10_000.0
    kind: str = "default"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        check_key("rope_theta", self.theta)
        check_rope(self.kind, dict(self.options))

    def option(self, name: str, default=None):
        return dict(self.options).get(name, default)


class _Options:
    """Options that check themselves against the schema when they are made."""

    KEY: ClassVar[str]

    def __post_init__(self):
        for name, check in OPTIONS[self.KEY].items():
            check(f"{self.KEY}.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class GKAConfig(_Options):
    """Gated KalmaNet options (arXiv 2511.21016), named as in hybrid-model-factory's `gka_config`; `precision` (fast,
    accurate: of the kernels' solve) is ours."""

    KEY: ClassVar[str] = "gka_config"

    num_iter: int = 30
    ridge_strength: float = 0.02
    chunk_size: int = 64
    conv_size: int = 4
    norm_eps: float = 1e-6
    gla_rescale: bool = True
    use_alpha_connection: bool = True
    use_beta_gate: bool = True
    use_forgetting_gate: bool = True
    use_forgetting_gate_kk: bool = True
    use_gate: bool = True
    use_v_conv: bool = True
    bp_lambda: bool = True
    precision: str = "fast"


@dataclasses.dataclass(frozen=True)
class GDNConfig(_Options):
    """Gated DeltaNet options, named as in hybrid-model-factory's `gdn_config`."""

    KEY: ClassVar[str] = "gdn_config"

    conv_size: int = 4
    conv_bias: bool = False
    norm_eps: float = 1e-5
    allow_neg_eigval: bool = False
    use_gate: bool = True
    use_short_conv: bool = True


@dataclasses.dataclass(frozen=True)
class Mamba2Config(_Options):
    """Mamba-2 options, named as in hybrid-model-factory's `mamba2_config`."""

    KEY: ClassVar[str] = "mamba2_config"

    use_qk_norm: bool = True


@dataclasses.dataclass(frozen=True)
class SWAConfig(_Options):
    """Sliding-window attention: query i sees keys j with 0 <= i - j < window_size."""

    KEY: ClassVar[str] = "swa_config"

    window_size: int = 2048


@dataclasses.dataclass(frozen=True)
class BMojoConfig(_Options):
    """B'MOJO-F: one softmax over a window of keys and a window of fading keys made by a mixer."""

    KEY: ClassVar[str] = "bmojo_config"

    window_size: int = 2048
    ssm_mixer: str = "mamba2"
    tie_attn_weights: bool = True


@dataclasses.dataclass(frozen=True)
class MoEConfig(_Options):
    """A mixture-of-experts MLP: softmax router, top-k experts, no shared expert."""

    KEY: ClassVar[str] = "moe"

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"num_experts_per_tok must be at most num_experts ({self.num_experts}), got {self.experts_per_token}")


# Key of config.json -> (ModelConfig field, its class).
MIXER_CONFIGS = {
    "gka_config": ("gka", GKAConfig),
    "gdn_config": ("gdn", GDNConfig),
    "mamba2_config": ("mamba2", Mamba2Config),
    "swa_config": ("swa", SWAConfig),
    "bmojo_config": ("bmojo", BMojoConfig),
}


def mixer_config_from_dict(key: str, values: Mapping[str, Any]):
    """Reads one of config.json's mixer dicts (`gka_config`, ...).

    What the dict repeats from the model is not checked here: see `hybrid_jax.families.mixers`.

    Raises:
      ValueError: an unknown option, one of a wrong type or out of its range, or one that this project cannot honour.
    """
    _, cls = MIXER_CONFIGS[key]
    known = {f.name for f in dataclasses.fields(cls)}
    kept = {}
    for name, value in check_key(key, values).items():
        where = f"{key}.{name}"
        if name in known:
            kept[name] = value
        elif name in FIXED[key]:
            expected = FIXED[key][name]
            if (type(value), value) != (type(expected), expected):
                raise ValueError(f"{where} = {value!r} is not supported; only {expected!r} is")
        elif name in FREE.get(key, {}):
            FREE[key][name](where, value)
        elif name not in REPEATED[key] and value is not None:
            raise ValueError(f"{key} has the unknown option {name!r}; known: {', '.join(sorted(known))}")
    return cls(**kept)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a decoder, whatever family it comes from.

    Args:
      family: key of `hybrid_jax.families.FAMILIES`.
      layers: one `MixerSpec` per layer.
      attention_windows: per layer, the source's own sliding window, or None for full attention.
      query_scaling: Ministral-3's (beta, original_max_position_embeddings): queries are multiplied by
        1 + beta * log(1 + floor(position / original_max_position_embeddings)).
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
    max_position_embeddings: int = 32768
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_windows: tuple[int | None, ...] = ()
    query_scaling: tuple[float, int] | None = None
    initializer_range: float = 0.02
    moe: MoEConfig | None = None
    gka: GKAConfig = GKAConfig()
    gdn: GDNConfig = GDNConfig()
    mamba2: Mamba2Config = Mamba2Config()
    swa: SWAConfig = SWAConfig()
    bmojo: BMojoConfig = BMojoConfig()
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
        windows = self.attention_windows or (None,) * len(self.layers)
        object.__setattr__(self, "attention_windows", tuple(check_key("attention_windows", windows)))
        if len(self.attention_windows) != len(self.layers):
            raise ValueError(
                f"attention_windows has {len(self.attention_windows)} entries, the model has {len(self.layers)} layers"
            )
        if not self.gka.use_forgetting_gate_kk and self.gka.num_iter:
            raise ValueError("gka_config.use_forgetting_gate_kk = false is not supported")
        for i, layer in enumerate(self.layers):
            for kind in layer.kinds:
                if kind in NOT_BUILT:
                    raise NotImplementedError(f"layer {i}: {layer.symbol!r} is not built yet")
            if layer.attention_heads:
                wrong = [h for h in layer.attention_heads if h >= self.num_heads]
                if wrong:
                    raise ValueError(f"layer {i}: {layer.symbol!r} keeps head {wrong[0]}, the model has {self.num_heads}")
                raise NotImplementedError(f"layer {i}: head-level hybrids ({layer.symbol!r}) are not built yet")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def pattern(self) -> str:
        return format_pattern(self.layers)

    @property
    def is_hybrid(self) -> bool:
        return any(layer != MixerSpec(ATTENTION) for layer in self.layers)

    @property
    def is_fused(self) -> bool:
        return any(layer.fused for layer in self.layers)

    def with_pattern(self, pattern: str | Sequence[MixerSpec]) -> ModelConfig:
        """The same model with other mixers.

        Raises:
          ValueError: the pattern is invalid or has a wrong length.
        """
        layers = parse_pattern(pattern, self.num_layers) if isinstance(pattern, str) else tuple(pattern)
        if len(layers) != self.num_layers:
            raise ValueError(f"the pattern has {len(layers)} layers, the model has {self.num_layers}")
        return dataclasses.replace(self, layers=layers)

    def fused(self) -> ModelConfig:
        """The two-stream form: every mixer beside the attention it replaces, attention on both streams."""
        return self.with_pattern([s if s.fused else s.fused_with_attention() for s in self.layers])

    def unfused(self) -> ModelConfig:
        """The one-stream form: teachers dropped."""
        return self.with_pattern([s.unfused() for s in self.layers])

    def teacher(self) -> ModelConfig:
        """The one-stream form of the teacher stream; of a model that is not fused, the model itself."""
        return self.with_pattern([MixerSpec(s.teaching) for s in self.layers])
