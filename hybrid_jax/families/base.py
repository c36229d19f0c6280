"""Reading and writing config.json: what every family shares. A family's file adds its own few lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybrid_jax.checks import check_choice
from hybrid_jax.config import ModelConfig, MoEConfig, parse_pattern
from hybrid_jax.families.mixers import check_repeated, read_mixers, write_mixers
from hybrid_jax.families.rope import DEFAULT_THETA, read_query_scaling, read_rope, read_ropes, write_rope
from hybrid_jax.mixers import KINDS, options_by_key
from hybrid_jax.schema import Check, check_finite, check_key

# transformers' defaults for keys that a config.json may leave out; a family's own come before these.
_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "num_key_value_heads": None,
    "head_dim": None,
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# Keys that ModelConfig carries, so that `extra` need not.
_HANDLED = {
    *_REQUIRED, "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "tie_word_embeddings",
    "initializer_range", "hybrid_override_pattern", "layer_types", "attention_windows", "architectures", "model_type",
    "torch_dtype", "dtype", "transformers_version",
}  # fmt: skip
HYBRID_PREFIX = "hybrid_"
_OF_ATTENTION = {"rope", "max_position_embeddings"}  # layouts of their own state them beside attention


class OwnLayout(NamedTuple):
    """A source's config.json that has not transformers' keys.

    Hybrids of such a source have transformers' keys, with the family's name and the prefix `hybrid_`, as those of other families.

    Args:
      recognizes: whether a config.json without `model_type` is of the family.
      read: config.json -> transformers' keys, all of them checked under its own names, and what is kept for the export.
      write: (ModelConfig, dtype of the weights) -> config.json.
    """

    recognizes: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
    write: Callable[[ModelConfig, str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A source family.

    Args:
      model_type: of config.json; a hybrid's has the prefix `hybrid_`.
      architecture: the class name transformers knows it by.
      read: config.json -> the ModelConfig fields in which this family differs from the defaults.
      write: ModelConfig -> the keys of config.json that `read` reads.
      window_keys: the keys that set the source's window: none, its number of keys, or that one and `use_sliding_window`.
      window_type: the layers with the window in `layer_types`; the others are `full_attention`.
      layer_types: transformers takes from `layer_types` which layers have the window.
      windowed: (config.json, layer) -> whether a layer has the window where `layer_types` does not say.
      defaults: transformers' defaults of this family for keys that a config.json may leave out.
      rope: its rope parameters where config.json has none.
      rope_theta: the base of its rotary embedding where config.json has none.
      window_rope_theta: the same of layers with a window, if the family has rope parameters per layer type; None: it has not.
      window_rope_key: the key of config.json that older files have that base in.
      keys: checks of keys that are stricter than the schema's.
      partial_rotary: it honours `partial_rotary_factor`, the part of a head's channels that is rotated.
      position_axes: its tokens have positions on several axes (time, height, width), which are one in text: `mrope_section`, which
        shares channels out among them, changes nothing.
      rope_types: other names of rope types in its config.json -> ours.
      fused: ModelConfig -> linear maps or convolutions of a layer that its checkpoints keep in one, `{theirs: {ours: outputs}}`, in
        order, by their paths in the layer.
      groups: ModelConfig -> `{theirs: number}` of those of `fused` that consist of so many groups (heads), each with its share of
        the outputs of every one of ours, in order.
      names: parts of our tensors' names -> what its checkpoints have there.
      stacked_experts: its checkpoints keep the experts of a layer in two tensors, gate and up together [experts, in, 2 out] and
        down [experts, in, out]. Of other families the files may hold one tensor for each expert and map, or two per layer,
        [experts, 2 out, in] and [experts, out, in].
      intermediate_key: the key of config.json that has the hidden width of the dense MLP.
      norm_eps_key: the key of config.json that has the epsilon of the norms.
      activation_key: the key of config.json that names the activation of the MLP.
      activations: the names that it may have there -> ours, the default first.
      ignored: what the names of tensors begin with that are no part of the decoder.
      wrapper: the model type of transformers' class of the family that reads images too; config.json of its checkpoints has the
        decoder's keys in `text_config`. Empty: there is none.
      wrapped: what names of the decoder's tensors begin with -> what they begin with in such a checkpoint.
      layers: config.json of a source -> the symbol of every layer's mixer; None: all are attention, or `layer_types` are a
        hybrid's symbols.
      mixers: config.json -> options of mixers that the family's own keys state, `{"gdn_config": {name: value}}`.
      own_layout: how the source's config.json is read and written where it is not transformers'; None: it is.
    """

    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    window_keys: tuple[str, ...] = ()
    window_type: str = "sliding_attention"
    layer_types: bool = False
    windowed: Callable[[Mapping[str, Any], int], bool] = lambda hf, layer: True
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda hf: None
    rope_theta: float = DEFAULT_THETA
    window_rope_theta: float | None = None
    window_rope_key: str = ""
    keys: Mapping[str, Check] = dataclasses.field(default_factory=dict)
    partial_rotary: bool = False
    position_axes: bool = False
    rope_types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Callable[[ModelConfig], dict[str, dict[str, int]]] = lambda config: {}
    groups: Callable[[ModelConfig], dict[str, int]] = lambda config: {}
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stacked_experts: bool = False
    intermediate_key: str = "intermediate_size"
    norm_eps_key: str = "rms_norm_eps"
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
    ignored: tuple[str, ...] = ()
    wrapper: str = ""
    wrapped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: Callable[[Mapping[str, Any]], list[str] | None] = lambda hf: None
    mixers: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]] = lambda hf: {}
    own_layout: OwnLayout | None = None


def _source_types(family: Family, hf: Mapping[str, Any]) -> list[str] | None:
    """`layer_types` as transformers writes them; None if they are absent, or a hybrid's symbols."""
    types = hf.get("layer_types")
    return types if types is not None and all(t in (family.window_type, "full_attention") for t in types) else None


def _read_windows(family: Family, hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if "attention_windows" in hf:
        if len(hf["attention_windows"]) != num_layers:
            raise ValueError(f"attention_windows has {len(hf['attention_windows'])} entries, num_hidden_layers is {num_layers}")
        return tuple(hf["attention_windows"])
    types = _source_types(family, hf)
    if types is not None and len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers is {num_layers}")
    used = family.window_keys and ("use_sliding_window" not in family.window_keys or hf["use_sliding_window"])
    window = hf[family.window_keys[0]] if used else None
    if family.layer_types and types is not None:
        windowed = [t == family.window_type for t in types]
        if any(windowed) and window is None:
            raise ValueError(f"a layer is {family.window_type!r} but {' and '.join(family.window_keys)} set no window")
    else:
        windowed = [family.windowed(hf, i) for i in range(num_layers)]
    return tuple(window if w else None for w in windowed)


def _write_windows(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The keys from which `_read_windows` reads the windows of a model that is no hybrid."""
    windows = sorted({w for w in config.attention_windows if w is not None})
    window = windows[0] if windows else None
    keys: dict[str, Any] = {}
    if "use_sliding_window" in family.window_keys:
        keys["use_sliding_window"] = window is not None
    if family.window_keys and (window is not None or not keys):
        # where `layer_types` gives it to no layer, the source's own stays: transformers' masks of Llama 4 need one
        keys[family.window_keys[0]] = config.extra.get(family.window_keys[0]) if window is None and family.layer_types else window
    if family.layer_types:
        keys["layer_types"] = ["full_attention" if w is None else family.window_type for w in config.attention_windows]
    return keys


def _read_layers(family: Family, hf: Mapping[str, Any], num_layers: int):
    pattern, own = hf.get("hybrid_override_pattern"), family.layers(hf)
    symbols = hf.get("layer_types") if own is None and _source_types(family, hf) is None else None
    layers = parse_pattern(pattern or symbols or own or ["*"] * num_layers, num_layers)
    if pattern and symbols and parse_pattern(symbols, num_layers) != layers:
        raise ValueError(f"hybrid_override_pattern {pattern!r} and layer_types {'-'.join(symbols)!r} contradict each other")
    return layers


def _with_own_mixers(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the options of mixers that the family's own keys state in the mixers' dicts.

    Raises:
      ValueError: a dict contradicts them.
    """
    dicts = {}
    for key, own in family.mixers(hf).items():
        given = hf.get(key) or {}
        if wrong := [name for name, value in own.items() if given.get(name, value) != value]:
            raise ValueError(
                f"{key}.{wrong[0]} = {given[wrong[0]]!r} contradicts the other keys of config.json, by which "
                f"it is {own[wrong[0]]!r}; leave it out, or change those"
            )
        dicts[key] = {**given, **own}
    return {**hf, **dicts}


def read_config(family: Family, hf: Mapping[str, Any]) -> ModelConfig:
    """config.json of a source model or a hybrid of it -> ModelConfig.

    Every key that is read is checked against the schema before anything is built.

    Raises:
      ValueError: a key is missing, of a wrong type, out of its range, unsupported, or contradicts another.
    """
    check_finite(hf)
    extra = None
    if family.own_layout is not None and hf.get("model_type") != HYBRID_PREFIX + family.model_type:
        hf, extra = family.own_layout.read(hf)
    missing = [k for k in (*_REQUIRED, family.intermediate_key) if k not in hf and k not in family.defaults]
    if missing:
        raise ValueError(f"config.json of a {family.model_type} lacks {', '.join(missing)}")
    absent = {**_DEFAULTS, family.norm_eps_key: 1e-6, family.activation_key: next(iter(family.activations)), **family.defaults}
    hf = {**absent, **hf}
    check_choice(family.activation_key, hf[family.activation_key], list(family.activations))
    for key, value in hf.items():
        check_key(key, value)
        if key in family.keys:
            family.keys[key](key, value)
    if extra is None and hf[family.intermediate_key] == 0:
        raise ValueError(
            f"{family.intermediate_key} = 0 is not supported: with transformers' keys, which hybrids have too, every layer has an "
            "MLP; give its width. Layers without an MLP are read and written in the released layout of Mamba-3 only"
        )
    num_layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    if family.window_rope_theta is None:
        known: dict[str, Any] = dict(partial=family.partial_rotary, names=family.rope_types, position_axes=family.position_axes)
        rope = read_rope(hf, family.rope(hf), family.rope_theta, **known)
        window_rope = None
    else:
        rope, window_rope = read_ropes(hf, family.rope_theta, family.window_rope_theta, family.window_rope_key)
    own, hf, handled = family.read(hf), _with_own_mixers(family, hf), _HANDLED | {family.norm_eps_key, family.intermediate_key}
    mixers, kept = read_mixers(hf, own.get("qk_norm", False) or own.get("qk_norm_rotated", False))
    if extra is None:
        extra = {**{k: v for k, v in hf.items() if k not in handled and k not in options_by_key()}, **kept}
    config = ModelConfig(
        family=family.model_type,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf[family.intermediate_key],
        num_heads=heads,
        num_kv_heads=heads if hf["num_key_value_heads"] is None else hf["num_key_value_heads"],
        head_dim=hf["hidden_size"] // heads if hf["head_dim"] is None else hf["head_dim"],
        layers=_read_layers(family, hf, num_layers),
        rms_norm_eps=hf[family.norm_eps_key],
        rope=rope,
        window_rope=window_rope,
        query_scaling=read_query_scaling(rope) if family.rope(hf) else None,
        max_position_embeddings=hf["max_position_embeddings"],
        tie_embeddings=hf["tie_word_embeddings"],
        activation=family.activations[hf[family.activation_key]],
        attention_windows=_read_windows(family, hf, num_layers),
        initializer_range=hf["initializer_range"],
        extra=extra,
        mixers=mixers,
        **own,
    )
    check_repeated(hf, config)
    return config


def write_config(family: Family, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """ModelConfig -> config.json, hybrid-model-factory's if there is any mixer but attention.

    Raises:
      ValueError: the family's config.json cannot describe the model (a window per layer where the family has one for all).
    """
    common = {
        **{k: v for k, v in config.extra.items() if k not in options_by_key()},
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        family.intermediate_key: config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.norm_eps_key: config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": dtype,
        **write_rope(config, partial=family.partial_rotary),
        **family.write(config),
    }
    if not config.is_hybrid and family.own_layout is not None:
        written = family.own_layout.write(config, dtype)
    elif not config.is_hybrid:
        written = {
            **common,
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **_write_windows(family, config),
        }
    else:
        written = {
            **common,
            "architectures": ["Hybrid" + family.architecture],
            "model_type": HYBRID_PREFIX + family.model_type,
            "hybrid_override_pattern": config.pattern,
            "layer_types": [layer.symbol for layer in config.layers],
            "attention_windows": list(config.attention_windows),
            **write_mixers(config),
        }
    again, wanted = read_config(family, written), config
    if not config.is_hybrid:  # options of mixers that it does not have are not written
        used = config.used_options()
        again, wanted = (dataclasses.replace(x, mixers=tuple(m for m in x.mixers if type(m) in used)) for x in (again, wanted))
    unread = set() if any(KINDS[kind].attends for layer in config.layers for kind in layer.kinds) else _OF_ATTENTION
    fields = [f.name for f in dataclasses.fields(config) if f.compare and not (family.own_layout and f.name in unread)]
    wrong = [name for name in fields if getattr(again, name) != getattr(wanted, name)]
    if wrong:
        raise ValueError(
            f"config.json of a {family.model_type} cannot describe this model: {wrong[0]} is {getattr(config, wrong[0])!r}, "
            f"and would be read as {getattr(again, wrong[0])!r}"
        )
    return written


_MOE_DEFAULTS = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}


def dense_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer's MLP is dense: those in `mlp_only_layers`, and all but every `decoder_sparse_step`th."""
    step, listed = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    return tuple(i in listed or (i + 1) % step != 0 for i in range(hf["num_hidden_layers"]))


def read_moe(hf: Mapping[str, Any], num_experts: int = 128) -> MoEConfig:
    """The mixture-of-experts keys, under either of transformers' names.

    Args:
      num_experts: of the family, where config.json has neither name.

    Raises:
      ValueError: some layers are dense, or the two names of the number of experts contradict each other.
    """
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise ValueError("models that mix dense and expert layers (mlp_only_layers, decoder_sparse_step) are not supported")
    counts = {hf[name] for name in ("num_experts", "num_local_experts") if name in hf}
    if len(counts) > 1:
        raise ValueError(f"num_experts and num_local_experts contradict each other: {sorted(counts)}")
    values = {**_MOE_DEFAULTS, **hf}
    return MoEConfig(
        num_experts=next(iter(counts), num_experts),
        experts_per_token=values["num_experts_per_tok"],
        intermediate_size=values["moe_intermediate_size"],
        norm_topk_prob=values["norm_topk_prob"],
    )


def _experts(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise ValueError(f"a {config.family} model needs ModelConfig.moe, the options of its experts")
    return config.moe


def expert_counts(config: ModelConfig, name: str) -> dict[str, int]:
    """The number of experts, under the name that came in, or both, or else `name`; and how many process a token."""
    names = [key for key in ("num_experts", "num_local_experts") if key in config.extra] or [name]
    moe = _experts(config)
    return {**dict.fromkeys(names, moe.num_experts), "num_experts_per_tok": moe.experts_per_token}


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_moe` reads; the number of experts under both names, if both came in."""
    moe = _experts(config)
    return {
        **expert_counts(config, "num_experts"),
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
