"""The schema of config.json: the type and the range of every key that is read, in one table.

`ModelConfig` checks itself with the same table, so that a config made in Python obeys the same rules; the options of the
mixers carry their own checks (`hybrid_jax.mixers`). A check takes (name, value) and raises a ValueError that names the key,
what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybrid_jax.checks import check_boolean, check_choice
from hybrid_jax.mixers import options_by_key
from hybrid_jax.options import EPSILON, Check, MixerOptions, integer, number, optional

MOST_LAYERS = 10_000


def list_of(check: Check) -> Check:
    """Returns a check for a list whose items all pass `check`."""

    def checked(name, value):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return [check(f"{name}[{i}]", item) for i, item in enumerate(value)]

    return checked


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    return value


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f'{name} must be an object ({{"key": value}}), got {value!r}')
    return value


def pattern(name: str, value: Any):
    """A string, or a list of strings; neither empty."""
    if value in ("", [], ()):
        raise ValueError(f"{name} must name the mixer of every layer, got {value!r}")
    return text(name, value) if isinstance(value, str) else list_of(text)(name, value)


def token_ids(name: str, value: Any):
    """null, one id, or a list of them; negative ids mean none."""
    ids = list_of(integer(-1)) if isinstance(value, list | tuple) else optional(integer(-1))
    return ids(name, value)


SIZE = integer(1, 2**24)

# Keys of config.json.
KEYS: dict[str, Check] = {
    "vocab_size": integer(),
    "hidden_size": SIZE,
    "intermediate_size": integer(0, 2**24),  # 0 in released layouts only: see `families.base.read_config`
    "intermediate_size_mlp": SIZE,
    "num_hidden_layers": integer(1, MOST_LAYERS),
    "num_attention_heads": integer(1, 2**16),
    "num_key_value_heads": optional(integer(1, 2**16)),
    "head_dim": optional(integer(1, 2**16)),
    "rms_norm_eps": EPSILON,
    "layer_norm_eps": EPSILON,
    "qk_layernorm": check_boolean,
    "max_position_embeddings": integer(),
    "original_max_position_embeddings": integer(),
    "partial_rotary_factor": optional(number(above=0, maximum=1)),
    "rope_theta": number(above=1),
    "rope_scaling": optional(mapping),
    "rope_parameters": optional(mapping),
    "tie_word_embeddings": check_boolean,
    "initializer_range": number(minimum=0, maximum=1),
    "attention_bias": check_boolean,
    "mlp_bias": check_boolean,
    "use_sliding_window": check_boolean,
    "sliding_window": optional(integer()),
    "max_window_layers": integer(0),
    "attention_chunk_size": optional(integer()),
    "attn_temperature_tuning": check_boolean,
    "attn_scale": number(minimum=0),
    "floor_scale": integer(),
    "use_qk_norm": check_boolean,
    "layer_types": optional(list_of(text)),
    "attention_windows": list_of(optional(integer())),
    "full_attention_interval": integer(),
    "linear_conv_kernel_dim": integer(1, 1024),
    "linear_key_head_dim": integer(1, 2**16),
    "linear_value_head_dim": integer(1, 2**16),
    "linear_num_key_heads": integer(1, 2**16),
    "linear_num_value_heads": integer(1, 2**16),
    "no_rope_layers": optional(list_of(integer(0, 1))),
    "no_rope_layer_interval": integer(),
    "hybrid_override_pattern": optional(pattern),
    "num_experts": integer(1, 2**16),
    "num_local_experts": integer(1, 2**16),
    "num_experts_per_tok": integer(1, 2**16),
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": check_boolean,
    "shared_expert_intermediate_size": SIZE,
    "decoder_sparse_step": integer(0),
    "mlp_only_layers": optional(list_of(integer(0))),
    "interleave_moe_layer_step": integer(),
    "moe_layers": optional(list_of(integer(0))),
    "eos_token_id": token_ids,
    "bos_token_id": token_ids,
    "pad_token_id": token_ids,
}

# Fields of ModelConfig -> the key of config.json whose check they share.
MODEL_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}

# The keys of rope_parameters.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ROPE_KEYS: dict[str, Check] = {
    "factor": number(above=0),
    "low_freq_factor": number(above=0),
    "high_freq_factor": number(above=0),
    "original_max_position_embeddings": integer(),
    "attention_factor": optional(number(above=0)),
    "beta_fast": optional(number(minimum=0)),
    "beta_slow": optional(number(minimum=0)),
    "mscale": optional(number(minimum=0)),
    "mscale_all_dim": optional(number(minimum=0)),
    "truncate": check_boolean,
    "partial_rotary_factor": number(above=0, maximum=1),
    "short_factor": list_of(number(above=0)),
    "long_factor": list_of(number(above=0)),
    "mrope_section": list_of(integer(0)),
    "llama_4_scaling_beta": optional(number(minimum=0)),
}
ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


def check_key(key: str, value: Any) -> Any:
    """Checks a value of config.json against the schema and returns it; a key that the schema does not have passes."""
    if key in options_by_key():
        return optional(mapping)(key, value)
    return KEYS[key](key, value) if key in KEYS else value


def check_rope(kind: str, options: Mapping[str, Any]) -> None:
    """The options of a rotary embedding of one type.

    Raises:
      ValueError: a missing option, one of a wrong type or out of its range, or a dict where a number is expected.
    """
    check_choice("rope_parameters.rope_type", kind, ROPE_TYPES)
    for name, value in options.items():
        where = f"rope_parameters.{name}"
        if isinstance(value, Mapping):
            raise ValueError(f"{where} is an object: rope parameters per layer type are not supported, give one set for all layers")
        if kind in ("yarn", "longrope") and name == "factor" and value is None:
            continue  # then it is max_position_embeddings / original_max_position_embeddings
        if name in ROPE_KEYS:
            ROPE_KEYS[name](where, value)
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{where} must be a number, a string or a boolean, got {value!r}")
    missing = [name for name in ROPE_REQUIRED[kind] if name not in options]
    if missing:
        raise ValueError(f"rope_parameters of rope_type {kind!r} lack {', '.join(missing)}")
    if kind == "llama3" and options["high_freq_factor"] < options["low_freq_factor"]:
        raise ValueError(
            "rope_parameters.high_freq_factor must be at least low_freq_factor, "
            f"got {options['high_freq_factor']!r} and {options['low_freq_factor']!r}"
        )


def check_finite(values: Any, name: str = "config.json") -> None:
    """Refuses NaN and infinities anywhere in a JSON value: JSON has neither, and each spoils what reads it."""
    pending = [(name, values)]
    while pending:
        where, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(f"{where}: {k}", v) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(f"{where}[{i}]", v) for i, v in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} must be finite, got {value!r}")


def mixer_config_from_dict(key: str, values: Mapping[str, Any]) -> MixerOptions:
    """Reads one of config.json's mixer dicts (`gka_config`, ...).

    Keys that repeat the model's sizes are not checked here: see `hybrid_jax.families.mixers`.

    Raises:
      ValueError: an unknown option, one of a wrong type or out of its range, or one that this project cannot honour.
    """
    cls = options_by_key()[key]
    known, kept = cls.checks(), {}
    for name, value in check_key(key, values).items():
        where = f"{key}.{name}"
        if name in known:
            kept[name] = value
        elif name in cls.FIXED:
            expected = cls.FIXED[name]
            if (type(value), value) != (type(expected), expected):
                raise ValueError(f"{where} = {value!r} is not supported; only {expected!r} is")
        elif name in cls.FREE:
            cls.FREE[name](where, value)
        elif name not in cls.REPEATED and value is not None:
            raise ValueError(f"{key} has the unknown option {name!r}; known: {', '.join(sorted(known))}")
    return cls(**kept)
