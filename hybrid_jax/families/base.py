"""Reading and writing config.json: what every family shares. A family's file adds its own few lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hybrid_jax.config import MIXER_CONFIGS, ModelConfig, MoEConfig, RopeConfig, mixer_config_from_dict, parse_pattern

_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
# Keys that ModelConfig carries, so that `extra` need not.
_HANDLED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings",
    "tie_word_embeddings", "initializer_range", "hybrid_override_pattern", "layer_types", "attention_windows",
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", *MIXER_CONFIGS,
}  # fmt: skip
HYBRID_PREFIX = "hybrid_"
_WINDOWED = {"sliding_attention": True, "full_attention": False}


@dataclasses.dataclass(frozen=True)
class Family:
    """A source family.

    Args:
      model_type: of config.json; a hybrid's has the prefix `hybrid_`.
      architecture: the class name transformers knows it by.
      read: config.json -> the ModelConfig fields in which this family differs from the defaults.
      windows: (config.json, layer) -> whether the layer has the source's sliding window, where
        config.json has no list of `layer_types`.
      defaults: this family's defaults for keys that a config.json may leave out.
    """

    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    windows: Callable[[Mapping[str, Any], int], bool] = lambda hf, layer: False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """From transformers 5's `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    values = dict(hf.get("rope_parameters") or {})
    if not values:
        values = dict(hf.get("rope_scaling") or {})
        values["rope_theta"] = hf.get("rope_theta", 10_000.0)
    theta = values.pop("rope_theta", hf.get("rope_theta", 10_000.0))
    old, kind = values.pop("type", None), values.pop("rope_type", None)
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters.partial_rotary_factor other than 1 is not supported")
    return RopeConfig(float(theta), kind or old or "default", tuple(sorted(values.items())))


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Both schemas, so that old and new readers agree."""
    options = dict(rope.options)
    return {
        "rope_parameters": {**options, "rope_theta": rope.theta, "rope_type": rope.kind},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else {**options, "rope_type": rope.kind},
    }


def _read_windows(family: Family, hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if "attention_windows" in hf:
        return tuple(hf["attention_windows"])
    types, window = hf.get("layer_types"), hf.get("sliding_window")
    named = types is not None and all(t in _WINDOWED for t in types)
    if named and len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers is {num_layers}")
    windowed = [_WINDOWED[types[i]] if named else family.windows(hf, i) for i in range(num_layers)]
    if any(windowed) and not window:
        raise ValueError("a layer is 'sliding_attention' but sliding_window is not set")
    return tuple(window if w else None for w in windowed)


def read_config(family: Family, hf: Mapping[str, Any]) -> ModelConfig:
    """config.json of a source model or a hybrid of it -> ModelConfig.

    Raises:
      ValueError: a key is missing, unsupported or contradictory.
    """
    hf = {**_DEFAULTS, **family.defaults, **hf}
    missing = [
        k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") if k not in hf
    ]
    if missing:
        raise ValueError(f"config.json of a {family.model_type} lacks {', '.join(missing)}")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is")
    num_layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    pattern, types = hf.get("hybrid_override_pattern"), hf.get("layer_types")
    symbols = types if types and not all(t in _WINDOWED for t in types) else None
    layers = parse_pattern(pattern or symbols or ["*"] * num_layers, num_layers)
    if pattern and symbols and parse_pattern(symbols, num_layers) != layers:
        raise ValueError(f"hybrid_override_pattern {pattern!r} and layer_types {'-'.join(symbols)!r} contradict each other")
    mixers = {field: mixer_config_from_dict(key, hf[key]) for key, (field, _) in MIXER_CONFIGS.items() if hf.get(key)}
    own = family.read(hf)
    return ModelConfig(
        family=family.model_type,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        layers=layers,
        rms_norm_eps=hf["rms_norm_eps"],
        rope=_read_rope(hf),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_embeddings=hf["tie_word_embeddings"],
        attention_windows=_read_windows(family, hf, num_layers),
        initializer_range=hf["initializer_range"],
        extra={k: v for k, v in hf.items() if k not in _HANDLED},
        **mixers,
        **own,
    )


def _options(mixer) -> dict[str, Any]:
    """As hybrid-model-factory reads them: what it does not know is written only where it says something."""
    unknown = {"precision"} if getattr(mixer, "precision", "fast") == "fast" else set()
    return {name: value for name, value in dataclasses.asdict(mixer).items() if name not in unknown}


def write_config(family: Family, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """ModelConfig -> config.json, hybrid-model-factory's if there is any mixer but attention."""
    common = {
        **config.extra,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": dtype,
        **_write_rope(config.rope),
    }
    windows = config.attention_windows
    if not config.is_hybrid:
        types = ["full_attention" if w is None else "sliding_attention" for w in windows]
        return {**common, "architectures": [family.architecture], "model_type": family.model_type, "layer_types": types}
    used = {kind for layer in config.layers for kind in layer.kinds} | {config.bmojo.ssm_mixer}
    options = {
        key: _options(getattr(config, field))
        for key, (field, cls) in MIXER_CONFIGS.items()
        if field in used or getattr(config, field) != cls()
    }
    return {
        **common,
        "architectures": ["Hybrid" + family.architecture],
        "model_type": HYBRID_PREFIX + family.model_type,
        "hybrid_override_pattern": config.pattern,
        "layer_types": [layer.symbol for layer in config.layers],
        **options,
        **({"attention_windows": list(windows)} if any(windows) else {}),
    }


def read_moe(hf: Mapping[str, Any]) -> MoEConfig:
    """The mixture-of-experts keys, under either of transformers' names.

    Raises:
      ValueError: some layers are dense.
    """
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise ValueError("models that mix dense and expert layers (mlp_only_layers, decoder_sparse_step) are not supported")
    return MoEConfig(
        num_experts=hf.get("num_local_experts") or hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        intermediate_size=hf["moe_intermediate_size"],
        norm_topk_prob=hf.get("norm_topk_prob", False),
    )
