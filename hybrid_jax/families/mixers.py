"""The mixers' dicts of config.json (`gka_config`, ...): our options, and what hybrid-model-factory reads beside them.

Its training code derives sizes from the model; its plugin for vLLM reads them from these dicts and has other values, or
none, for absent keys. An export therefore repeats them, and a dict that contradicts its model is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybrid_jax.config import Mamba2Config, ModelConfig, mixer_config_from_dict
from hybrid_jax.mixers import MixerOptions, options_by_key
from hybrid_jax.recurrent_options import HeadsOptions


def repeated(options: type[MixerOptions], config: ModelConfig) -> dict[str, Any]:
    """Returns what one mixer's dict repeats from the model."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    values = {
        "hidden_size": config.hidden_size,
        "head_dim": dim,
        "num_q_heads": heads,
        "num_k_heads": kv_heads,
        "num_v_heads": kv_heads,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "d_model": config.hidden_size,
        "d_inner": heads * dim,
        "d_xb": kv_heads * dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "n_layer": config.num_layers,
        "ssm_cfg": {"expand": 1, "ngroups": heads, "d_state": config.options(Mamba2Config).state_size or dim},
        "use_qk_norm": config.qk_norm,
    }
    mixer = config.options(options)
    if isinstance(mixer, HeadsOptions) and mixer.own_heads is not None:
        values |= {
            "head_dim": mixer.value_size,
            "num_q_heads": mixer.key_heads,
            "num_k_heads": mixer.key_heads,
            "num_v_heads": mixer.own_heads,
        }
    return {name: values[name] for name in values if name in options.REPEATED}


def read_mixers(hf: Mapping[str, Any], qk_norm: bool) -> tuple[tuple[MixerOptions, ...], dict[str, dict[str, Any]]]:
    """Reads the mixers' dicts of a config.json.

    Args:
      hf: config.json.
      qk_norm: whether the source norms queries and keys.

    Returns:
      The mixers' options, and the other keys of each dict, which are kept for the export.

    Raises:
      ValueError: as `mixer_config_from_dict`.
    """
    options, kept = [], {}
    for key, cls in options_by_key().items():
        values = dict(hf.get(key) or {})
        for name in cls.ONLY_WITH_QK_NORM:
            if not qk_norm and values.get(name) is False:
                del values[name]
        if values:
            options.append(mixer_config_from_dict(key, values))
            own = cls.checks().keys() | cls.REPEATED
            kept[key] = {name: value for name, value in values.items() if name not in own}
    return tuple(options), {key: values for key, values in kept.items() if values}


def check_repeated(hf: Mapping[str, Any], config: ModelConfig) -> None:
    """Checks that the mixers' dicts do not contradict the model.

    Raises:
      ValueError: a repeated value that is not the model's.
    """
    for key, cls in options_by_key().items():
        values, model = hf.get(key) or {}, repeated(cls, config)
        for name in cls.REPEATED & values.keys():
            value, expected = values[name], model[name]
            if name == "ssm_cfg" and isinstance(value, Mapping):
                expected = {**expected, "repeat_kv_before_conv": False}
                wrong = [k for k, v in value.items() if k not in expected or v != expected[k]]
                if wrong:
                    raise ValueError(f"{key}.ssm_cfg.{wrong[0]} = {value[wrong[0]]!r} contradicts the model: {expected}")
            elif value != expected:
                raise ValueError(f"{key}.{name} = {value!r} contradicts the model, where it is {expected!r}")


def write_mixers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Returns the dicts of the mixers in use, and of those whose options are not the defaults, with everything the plugin reads."""
    used = config.used_options()
    dicts = {}
    for key, cls in options_by_key().items():
        mixer, default, kept = config.options(cls), cls(), config.extra.get(key, {})
        if cls not in used and mixer == default and not kept:
            continue
        options = {
            name: value and (config.qk_norm or config.qk_norm_rotated) if name in cls.ONLY_WITH_QK_NORM else value
            for name, value in dataclasses.asdict(mixer).items()  # pyright: ignore[reportArgumentType]
            if name not in cls.ONLY_IF_CHANGED or value != getattr(default, name)
        }
        dicts[key] = {**cls.STATED, **kept, **repeated(cls, config), **options}
    return dicts
