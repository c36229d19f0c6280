"""The schema of config.json: the type and the range of every key that is read, in one table.

`ModelConfig` and the option classes check themselves with the same tables, so that a config made in Python is held to
the same rules. Checks take (name, value) and raise a ValueError that names the key, what was expected and what came.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_number

Check = Callable[[str, Any], Any]
LARGEST = 2**31 - 1  # positions, token ids and sizes are 32-bit integers
MOST_LAYERS = 10_000


def integer(minimum: int = 1, maximum: int = LARGEST) -> Check:
    return functools.partial(check_integer, minimum=minimum, maximum=maximum)


def number(**bounds) -> Check:
    return functools.partial(check_number, **bounds)


def choice(*names: str) -> Check:
    return functools.partial(check_choice, choices=names)


def optional(check: Check) -> Check:
    """`check`, or null."""
    return lambda name, value: None if value is None else check(name, value)


def list_of(check: Check) -> Check:
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


EPSILON = number(above=0, below=1)
SIZE = integer(1, 2**24)

# Keys of config.json.
KEYS: dict[str, Check] = {
    "vocab_size": integer(),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": integer(1, MOST_LAYERS),
    "num_attention_heads": integer(1, 2**16),
    "num_key_value_heads": optional(integer(1, 2**16)),
    "head_dim": optional(integer(1, 2**16)),
    "rms_norm_eps": EPSILON,
    "max_position_embeddings": integer(),
    "original_max_position_embeddings": integer(),
    "partial_rotary_factor": optional(number(above=0, maximum=1)),
    "rope_theta": number(above=1),
    "rope_scaling": optional(mapping),
    "rope_parameters": optional(mapping),
    "tie_word_embeddings": check_boolean,
    "initializer_range": number(minimum=0, maximum=1),
    "hidden_act": choice("silu", "swish"),
    "attention_bias": check_boolean,
    "mlp_bias": check_boolean,
    "use_sliding_window": check_boolean,
    "sliding_window": optional(integer()),
    "max_window_layers": integer(0),
    "layer_types": optional(list_of(text)),
    "attention_windows": list_of(optional(integer())),
    "hybrid_override_pattern": optional(pattern),
    "num_experts": integer(1, 2**16),
    "num_local_experts": integer(1, 2**16),
    "num_experts_per_tok": integer(1, 2**16),
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": check_boolean,
    "decoder_sparse_step": integer(0),
    "mlp_only_layers": optional(list_of(integer(0))),
    "eos_token_id": token_ids,
    "bos_token_id": token_ids,
    "pad_token_id": token_ids,
    **{f"{mixer}_config": optional(mapping) for mixer in ("gka", "gdn", "mamba2", "swa", "bmojo")},
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

# The options of the mixers' dicts and of the mixture of experts.
OPTIONS: dict[str, dict[str, Check]] = {
    "gka_config": {
        "num_iter": integer(0, 10_000),
        "ridge_strength": number(minimum=0),
        "chunk_size": integer(1, 2**16),
        "conv_size": integer(1, 1024),
        "norm_eps": EPSILON,
        "precision": choice("fast", "accurate"),
        **dict.fromkeys(
            ("gla_rescale", "use_alpha_connection", "use_beta_gate", "use_forgetting_gate", "use_forgetting_gate_kk",
             "use_gate", "use_v_conv", "bp_lambda"), check_boolean),
    },
    "gdn_config": {
        "conv_size": integer(1, 1024),
        "norm_eps": EPSILON,
        **dict.fromkeys(("conv_bias", "allow_neg_eigval", "use_gate", "use_short_conv"), check_boolean),
    },
    "mamba2_config": {"use_qk_norm": check_boolean},
    "swa_config": {"window_size": integer()},
    "bmojo_config": {
        "window_size": integer(),
        "ssm_mixer": choice("gka", "gdn", "mamba2"),
        "tie_attn_weights": check_boolean,
    },
    "moe": {
        "num_experts": KEYS["num_experts"],
        "experts_per_token": KEYS["num_experts_per_tok"],
        "intermediate_size": KEYS["moe_intermediate_size"],
        "norm_topk_prob": check_boolean,
    },
}  # fmt: skip

_HEADS = {"hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads"}
# What the mixers' dicts repeat from the model: written on export, refused where they contradict the model.
REPEATED: dict[str, set[str]] = {
    "gka_config": _HEADS,
    "gdn_config": _HEADS,
    "mamba2_config": {
        "d_model", "d_inner", "d_xb", "intermediate_size", "hidden_act", "rms_norm_eps", "n_layer", "ssm_cfg",
    },
    "swa_config": set(),
    "bmojo_config": {"hidden_size", "head_dim", "num_heads", "num_key_value_heads", "rms_norm_eps", "use_qk_norm"},
}  # fmt: skip
_LOW_RANK = {"kv_proj_rank": None, "kv_learnable_residual": False}
# Options that hybrid-model-factory knows and that may have one value here.
FIXED: dict[str, dict[str, Any]] = {
    "gka_config": {**_LOW_RANK, "solver_type": "chebyshev", "conv_bias": False, "num_sketches_per_head": 1},
    "gdn_config": _LOW_RANK,
    "mamba2_config": {
        "use_pos_emb": False, "use_pos_embed": False, "use_rotary_emb": False, "d_conv": 4, "use_conv_bias": True,
        "use_bias": False, "xb_proj_rank": None, "xb_proj_activation": False, "xb_learnable_residual": False,
    },
    "swa_config": {},
    "bmojo_config": {},
}  # fmt: skip
# Options that say how a kernel of theirs computes, not what: any value, kept for the export.
FREE: dict[str, dict[str, Check]] = {"mamba2_config": {"chunk_size": integer()}}

# The keys of rope_parameters.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
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
    "llama_4_scaling_beta": optional(number(minimum=0)),
}
ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def check_key(key: str, value: Any):
    """A value of config.json by the schema; a key that the schema does not have passes."""
    return KEYS[key](key, value) if key in KEYS else value


def check_rope(kind: str, options: Mapping[str, Any]):
    """The options of a rotary embedding of one type.

    Raises:
      ValueError: a missing option, one of a wrong type or out of its range, or a dict where a number is expected.
    """
    check_choice("rope_parameters.rope_type", kind, ROPE_TYPES)
    for name, value in options.items():
        where = f"rope_parameters.{name}"
        if isinstance(value, Mapping):
            raise ValueError(f"{where} is an object: rope parameters per layer type are not supported, give one set for all layers")
        if kind == "yarn" and name == "factor" and value is None:
            continue  # then it is max_position_embeddings / original_max_position_embeddings
        if name in ROPE_KEYS:
            ROPE_KEYS[name](where, value)
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{where} must be a number, a string or a boolean, got {value!r}")
    missing = [name for name in ROPE_REQUIRED[kind] if name not in options]
    if missing:
        raise ValueError(f"rope_parameters of rope_type {kind!r} lack {', '.join(missing)}")
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise ValueError(
            "rope_parameters.high_freq_factor must be above low_freq_factor, "
            f"got {options['high_freq_factor']!r} and {options['low_freq_factor']!r}"
        )


def check_finite(values: Any, name: str = "config.json"):
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
