"""The mixers' dicts of config.json (`gka_config`, ...): our options, and what hybrid-model-factory reads beside them.

Its training code derives sizes from the model; its plugin for vLLM reads them from these dicts and has other values, or
none, for absent keys. An export therefore repeats them, and a dict that contradicts its model is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybrid_jax.config import MIXER_CONFIGS, ModelConfig, mixer_config_from_dict
from hybrid_jax.schema import REPEATED


def repeated(key: str, config: ModelConfig) -> dict[str, Any]:
    """What one mixer's dict repeats from the model."""
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
        "ssm_cfg": {"expand": 1, "ngroups": heads, "d_state": dim},
        "use_qk_norm": config.qk_norm,
    }
    return {name: values[name] for name in values if name in REPEATED[key]}


# Beside the repeated ones: what the plugin's Mamba-2 has other defaults for elsewhere, so that no default decides.
_STATED = {
    "mamba2_config": {"d_conv": 4, "use_conv_bias": True, "use_bias": False, "use_pos_emb": False, "chunk_size": 256},
    "gka_config": {"solver_type": "chebyshev", "kv_proj_rank": None, "kv_learnable_residual": False},
    "gdn_config": {"kv_proj_rank": None, "kv_learnable_residual": False},
}
# Written only where they differ from the default. `norm_eps`: the plugin gives a norm_eps that is present to the norms of
# the block too, which are trained with rms_norm_eps; where it is absent, both are as trained.
_ONLY_IF_CHANGED = {"precision", "norm_eps"}


def read_mixers(hf: Mapping[str, Any], qk_norm: bool) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The mixers' options as fields of ModelConfig, and the other keys of each dict, kept for the export.

    Raises:
      ValueError: as `mixer_config_from_dict`.
    """
    fields, kept = {}, {}
    for key, (field, cls) in MIXER_CONFIGS.items():
        values = dict(hf.get(key) or {})
        if key == "mamba2_config" and not qk_norm and values.get("use_qk_norm") is False:
            del values["use_qk_norm"]  # it says nothing where the source norms neither queries nor keys
        if values:
            fields[field] = mixer_config_from_dict(key, values)
            own = {f.name for f in dataclasses.fields(cls)} | REPEATED[key]
            kept[key] = {name: value for name, value in values.items() if name not in own}
    return fields, {key: values for key, values in kept.items() if values}


def check_repeated(hf: Mapping[str, Any], config: ModelConfig):
    """Refuses mixer dicts that contradict the model.

    Raises:
      ValueError: a repeated value that is not the model's.
    """
    for key in MIXER_CONFIGS:
        values, model = hf.get(key) or {}, repeated(key, config)
        for name in REPEATED[key] & values.keys():
            value, expected = values[name], model[name]
            if name == "ssm_cfg" and isinstance(value, Mapping):
                expected = {**expected, "repeat_kv_before_conv": False}
                wrong = [k for k, v in value.items() if k not in expected or v != expected[k]]
                if wrong:
                    raise ValueError(f"{key}.ssm_cfg.{wrong[0]} = {value[wrong[0]]!r} contradicts the model: {expected}")
            elif value != expected:
                raise ValueError(f"{key}.{name} = {value!r} contradicts the model, where it is {expected!r}")


def write_mixers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The dicts of the mixers in use, and of those whose options are not the defaults, with everything the plugin reads."""
    used = {kind for layer in config.layers for kind in layer.kinds}
    if "bmojo" in used:
        used.add(config.bmojo.ssm_mixer)
    dicts = {}
    for key, (field, cls) in MIXER_CONFIGS.items():
        mixer, default, kept = getattr(config, field), cls(), config.extra.get(key, {})
        if field not in used and mixer == default and not kept:
            continue
        options = {
            name: value
            for name, value in dataclasses.asdict(mixer).items()
            if name not in _ONLY_IF_CHANGED or value != getattr(default, name)
        }
        if key == "mamba2_config":
            options["use_qk_norm"] = config.qk_norm and config.mamba2.use_qk_norm
        dicts[key] = {**_STATED.get(key, {}), **kept, **repeated(key, config), **options}
    return dicts
