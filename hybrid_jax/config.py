"""What a model is: `ModelConfig`, `MixerSpec` and the pattern language.

This is the only file that decides whether a model is valid. Everything else may
trust a `ModelConfig` that exists.

The pattern language is hybrid-model-factory's: one symbol a layer, joined by `-`.

    *            attention                  GKA  GDN  M2  M3  SWA  BMF   mixers
    GKA*  SWA*   the mixer (student) beside the attention it learns from (teacher)
    *DA          one attention layer run on both streams with the same weights
    GDN>GKA      a mixer (teacher) beside another mixer that learns from it
    GDN[3,17]    a mixer whose heads 3 and 17 stay attention
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

ATTENTION = "attention"

# Pattern symbol -> mixer kind, and mixer kind -> the name of its parameters in a checkpoint.
SYMBOLS = {
    "*": ATTENTION,
    "SWA": "swa",
    "GKA": "gka",
    "GDN": "gdn",
    "M2": "mamba2",
    "M3": "mamba3",
    "BMF": "bmojo",
}
PARAMETER_KEYS = {
    ATTENTION: "self_attn",
    "swa": "swa",
    "gka": "gka",
    "gdn": "gdn",
    "mamba2": "mamba",
    "mamba3": "mamba3",
    "bmojo": "bmojo_f",
}
_SYMBOL_OF = {kind: symbol for symbol, kind in SYMBOLS.items()}
NOT_BUILT = {"mamba3"}


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """One decoder layer's token mixer.

    Args:
      kind: what the layer computes (the student, in a fused layer); a value of `SYMBOLS`.
      teacher: in a fused layer, the kind the student learns from; `None` otherwise.
        `attention` beside `attention` means one set of weights for both streams (`*DA`).
      attention_heads: heads that stay attention in a head-level hybrid.
    """

    kind: str
    teacher: str | None = None
    attention_heads: tuple[int, ...] = ()

    @property
    def fused(self) -> bool:
        return self.teacher is not None

    @property
    def shared(self) -> bool:
        """True when teacher and student are the same attention layer (`*DA`)."""
        return self.teacher == self.kind == ATTENTION

    @property
    def teaching(self) -> str:
        """The kind that the teacher stream computes: the teacher's, or the only one."""
        return self.teacher or self.kind

    @property
    def kinds(self) -> tuple[str, ...]:
        """The mixers whose weights the layer holds, student first."""
        return (self.kind,) if self.teacher in (None, self.kind) else (self.kind, self.teacher)

    @property
    def symbol(self) -> str:
        if self.shared:
            return "*DA"
        symbol = _SYMBOL_OF[self.kind]
        if self.attention_heads:
            symbol += "[" + ",".join(map(str, self.attention_heads)) + "]"
        if self.teacher == ATTENTION:
            return symbol + "*"
        return f"{_SYMBOL_OF[self.teacher]}>{symbol}" if self.teacher else symbol

    def unfused(self) -> MixerSpec:
        """The layer without its teacher."""
        return dataclasses.replace(self, teacher=None)

    def fused_with_attention(self) -> MixerSpec:
        """The layer beside the attention it replaces."""
        return dataclasses.replace(self, teacher=ATTENTION)


def _parse_symbol(text: str, where: str) -> MixerSpec:
    def fail(why: str):
        known = ", ".join(SYMBOLS)
        raise ValueError(
            f"hybrid pattern, {where}: {text!r} {why}; a symbol is one of {known}, a mixer "
            "followed by '*' (fused with attention), '*DA', 'TEACHER>STUDENT', or a mixer with the "
            "heads kept as attention, 'GDN[3,17]'"
        )

    if text == "*DA":
        return MixerSpec(ATTENTION, teacher=ATTENTION)
    if text == "*":
        return MixerSpec(ATTENTION)
    teacher = None
    body = text
    if ">" in body:
        teacher_symbol, _, body = body.partition(">")
        if teacher_symbol not in SYMBOLS or teacher_symbol == "*":
            fail(f"names no mixer before '>' ({teacher_symbol!r})")
        teacher = SYMBOLS[teacher_symbol]
    elif body.endswith("*"):
        teacher, body = ATTENTION, body[:-1]
    match = re.fullmatch(r"([A-Z0-9]+)(?:\[([0-9,]*)\])?", body)
    if match is None or match[1] not in SYMBOLS:
        fail("is not a known symbol")
    kind = SYMBOLS[match[1]]
    if teacher == kind:
        fail("fuses a mixer with itself")
    heads: tuple[int, ...] = ()
    if match[2] is not None:
        fields = match[2].split(",")
        if not all(fields):
            fail("has an empty head list or an empty place in it")
        heads = tuple(int(h) for h in fields)
        if list(heads) != sorted(set(heads)):
            fail("must list its heads in rising order, each once")
        if kind == "swa":
            fail("keeps heads of a mixer that is attention already")
    return MixerSpec(kind, teacher, heads)


def parse_pattern(pattern: str | Sequence[str], num_layers: int | None = None) -> tuple[MixerSpec, ...]:
    """Parses a hybrid pattern into one `MixerSpec` a layer.

    Args:
      pattern: symbols joined by `-` (`"*-GKA-*-GDN[3,17]"`), or a sequence of symbols.
      num_layers: how many layers the model has, if known.

    Raises:
      ValueError: an unknown symbol (the message names the layer and the symbol) or a wrong length.
    """
    symbols = pattern.split("-") if isinstance(pattern, str) else list(pattern)
    specs = tuple(_parse_symbol(s.strip(), f"layer {i}") for i, s in enumerate(symbols))
    if num_layers is not None and len(specs) != num_layers:
        raise ValueError(
            f"the hybrid pattern has {len(specs)} symbols, the model has {num_layers} layers; "
            "give one symbol a layer, e.g. '*-GKA-*-GKA' for four"
        )
    return specs


def format_pattern(layers: Sequence[MixerSpec]) -> str:
    """The pattern that `parse_pattern` reads back."""
    return "-".join(layer.symbol for layer in layers)


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
        if self.kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(f"rope_type {self.kind!r} is not supported; supported: default, linear, llama3, yarn")

    def option(self, name: str, default=None):
        return dict(self.options).get(name, default)


@dataclasses.dataclass(frozen=True)
class GKAConfig:
    """Gated KalmaNet options (arXiv 2511.21016), named as in hybrid-model-factory's `gka_config`; `precision` (fast,
    accurate: of the kernels' solve) is ours."""

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
class GDNConfig:
    """Gated DeltaNet options, named as in hybrid-model-factory's `gdn_config`."""

    conv_size: int = 4
    conv_bias: bool = False
    norm_eps: float = 1e-5
    allow_neg_eigval: bool = False
    use_gate: bool = True
    use_short_conv: bool = True


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 options, named as in hybrid-model-factory's `mamba2_config`."""

    use_qk_norm: bool = True


@dataclasses.dataclass(frozen=True)
class SWAConfig:
    """Sliding-window attention: query i sees keys j with 0 <= i - j < window_size."""

    window_size: int = 2048


@dataclasses.dataclass(frozen=True)
class BMojoConfig:
    """B'MOJO-F: one softmax over a window of keys and a window of fading keys made by a mixer."""

    window_size: int = 2048
    ssm_mixer: str = "mamba2"
    tie_attn_weights: bool = True


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts MLP: softmax router, top-k experts, no shared expert."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool = True


# Key of config.json -> (ModelConfig field, its class).
MIXER_CONFIGS = {
    "gka_config": ("gka", GKAConfig),
    "gdn_config": ("gdn", GDNConfig),
    "mamba2_config": ("mamba2", Mamba2Config),
    "swa_config": ("swa", SWAConfig),
    "bmojo_config": ("bmojo", BMojoConfig),
}

# What hybrid-model-factory's dicts repeat from the model, and options that must have one value.
_REPEATED = {
    "hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads", "num_heads", "num_key_value_heads",
    "rms_norm_eps", "d_model", "d_inner", "d_xb", "intermediate_size", "hidden_act", "n_layer", "ssm_cfg",
}  # fmt: skip
_FIXED = {"kv_proj_rank": None, "kv_learnable_residual": False, "solver_type": "chebyshev", "use_pos_emb": False}


def mixer_config_from_dict(key: str, values: Mapping[str, Any]):
    """Reads one of config.json's mixer dicts (`gka_config`, ...).

    Raises:
      ValueError: an unknown option, or one whose value this project can not honour.
    """
    _, cls = MIXER_CONFIGS[key]
    known = {f.name for f in dataclasses.fields(cls)}
    kept = {}
    for name, value in values.items():
        if name in known:
            kept[name] = value
        elif name in _FIXED:
            if value != _FIXED[name]:
                raise ValueError(f"{key}.{name} = {value!r} is not supported; only {_FIXED[name]!r} is")
        elif name not in _REPEATED:
            raise ValueError(f"{key} has the unknown option {name!r}; known: {', '.join(sorted(known))}")
    return cls(**kept)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a decoder, whatever family it comes from.

    Args:
      family: key of `hybrid_jax.families.FAMILIES`.
      layers: one `MixerSpec` a layer.
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
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        windows = self.attention_windows or (None,) * len(self.layers)
        object.__setattr__(self, "attention_windows", tuple(windows))
        if len(self.attention_windows) != len(self.layers):
            raise ValueError(
                f"attention_windows has {len(self.attention_windows)} entries, the model has {len(self.layers)} layers"
            )
        if self.swa.window_size < 1 or self.bmojo.window_size < 1:
            raise ValueError("window_size must be at least 1")
        if self.bmojo.ssm_mixer not in ("gka", "gdn", "mamba2"):
            raise ValueError(f"bmojo_config.ssm_mixer is {self.bmojo.ssm_mixer!r}; expected gka, gdn or mamba2")
        if not self.gka.use_forgetting_gate_kk and self.gka.num_iter:
            raise ValueError("gka_config.use_forgetting_gate_kk = false is not supported")
        if self.gka.precision not in ("fast", "accurate"):
            raise ValueError(f"gka_config.precision is {self.gka.precision!r}; expected fast or accurate")
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
