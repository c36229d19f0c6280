"""Mamba-3 language models (arXiv 2603.15569) in the layout of state-spaces/mamba.

config.json has no `model_type`; it is read from `d_model`, `n_layer`, `vocab_size`, rounded up to `pad_vocab_size_multiple`,
`d_intermediate`, rounded up to a multiple of 128 (0, its default: layers have no MLP, and one norm), `tie_embeddings`, `rms_norm`
(false: LayerNorms) and `ssm_cfg`, the options of the mixer, with `layer` "Mamba3". MIMO (`is_mimo`) rotates channel j with
j + d_state / 2, SISO 2j with 2j + 1. The epsilon of all norms is 1e-5.

Refused: other mixers, layers of attention (`attn_layer_idx`), MIMO of rank 1, and keys of `ssm_cfg` that are not known. How the
released program computes (`residual_in_fp32`, `fused_add_norm`, `chunk_size` and the like) changes nothing here and is written
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.checks import check_boolean
from hybrid_jax.config import Mamba3Config, ModelConfig
from hybrid_jax.families.base import Family, OwnLayout
from hybrid_jax.families.released import (
    HYBRID_KEYS,
    NAMES,
    kept_of,
    only,
    others_of,
    padded,
    read_keys,
    read_object,
    unpadded,
    vocab_multiple,
    with_kept,
)
from hybrid_jax.options import integer, number
from hybrid_jax.schema import KEYS, SIZE, list_of, mapping

_NORM_EPS = 1e-5
_MLP_MULTIPLE = 128
_MODEL_TYPE = "mamba3"
_KEYS = {
    "model_type": only(_MODEL_TYPE),
    "d_model": SIZE,
    "d_intermediate": integer(0, 2**24),
    "n_layer": KEYS["num_hidden_layers"],
    "vocab_size": KEYS["vocab_size"],
    "ssm_cfg": mapping,
    "attn_layer_idx": list_of(integer(0)),
    "attn_cfg": mapping,
    "rms_norm": check_boolean,
    "residual_in_fp32": check_boolean,
    "fused_add_norm": check_boolean,
    "pad_vocab_size_multiple": integer(),
    "tie_embeddings": check_boolean,
}
_DEFAULTS = {
    "model_type": _MODEL_TYPE,
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
_SSM_DEFAULTS = {
    "layer": "Mamba1",
    "d_state": 128,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "rope_fraction": 0.5,
    "dt_min": 1e-3,
    "dt_max": 0.1,
    "A_floor": 1e-4,
    "is_outproj_norm": False,
    "is_mimo": False,
}
_FREE = {
    "mimo_rank": integer(1, 64),
    "dt_init_floor": number(above=0),
    "chunk_size": integer(),
    "fuse_pregate_headwise_norm": check_boolean,
}


def _layer(name: str, value: Any) -> str:
    if value != "Mamba3":
        raise ValueError(f"{name} = {value!r} is not supported; only 'Mamba3' is ('Mamba1' is what an absent key means)")
    return value


def _rope_fraction(name: str, value: Any) -> float:
    if number()(name, value) not in (0.5, 1.0):
        raise ValueError(f"{name} must be 0.5 or 1.0, got {value!r}")
    return value


_SSM_KEYS = {
    "layer": _layer,
    "d_state": integer(2),
    "expand": number(above=0, maximum=2**16),
    "headdim": integer(1, 2**16),
    "ngroups": integer(1, 2**16),
    "rope_fraction": _rope_fraction,
    "dt_min": number(above=0),
    "dt_max": number(above=0),
    "A_floor": number(above=0),
    "is_outproj_norm": check_boolean,
    "is_mimo": check_boolean,
    **_FREE,
}


def _read_own(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own, extra = read_keys(hf, _KEYS, _DEFAULTS)
    ssm = read_object("ssm_cfg", own["ssm_cfg"], _SSM_KEYS, _SSM_DEFAULTS)
    if own["attn_layer_idx"]:
        raise ValueError(f"attn_layer_idx = {own['attn_layer_idx']!r} is not supported; only [] is, a model without attention")
    hidden, mimo = own["d_model"], ssm["is_mimo"]
    inner, rank = int(ssm["expand"] * hidden), ssm.get("mimo_rank", 4) if mimo else 1
    if inner % ssm["headdim"]:
        raise ValueError(f"ssm_cfg.headdim must divide expand * d_model ({inner}), got {ssm['headdim']}")
    heads = inner // ssm["headdim"]
    if heads % ssm["ngroups"]:
        raise ValueError(f"ssm_cfg.ngroups must divide the number of heads ({heads}), got {ssm['ngroups']}")
    if mimo and rank == 1:
        raise ValueError("ssm_cfg.mimo_rank = 1 with is_mimo = true is not supported; set is_mimo to false, or take a larger rank")
    vocab = padded(own["vocab_size"], own["pad_vocab_size_multiple"])
    width = padded(own["d_intermediate"], _MLP_MULTIPLE)
    options = {
        "state_size": None if ssm["d_state"] == ssm["headdim"] else ssm["d_state"],
        "rank": rank,
        "rope_fraction": ssm["rope_fraction"],
        "rotate_halves": mimo,
        "out_norm": ssm["is_outproj_norm"],
        "norm_per_head": ssm["is_outproj_norm"],
        "norm_eps": _NORM_EPS,
        "decay_floor": ssm["A_floor"],
        "dt_min": ssm["dt_min"],
        "dt_max": ssm["dt_max"],
        "groups": None if ssm["ngroups"] == heads else ssm["ngroups"],
    }
    keys = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": own["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": ssm["headdim"],
        "rms_norm": own["rms_norm"],
        "rms_norm_eps": _NORM_EPS,
        "tie_word_embeddings": own["tie_embeddings"],
        "hybrid_override_pattern": "-".join(["M3"] * own["n_layer"]),
        Mamba3Config.KEY: options,
    }
    names = ("residual_in_fp32", "fused_add_norm", *(("attn_cfg",) if own["attn_cfg"] else ()))
    free = {key: ssm[key] for key in _FREE if key in ssm and not (mimo and key == "mimo_rank")}
    sizes = {key: own[key] for key in ("vocab_size", "pad_vocab_size_multiple", "d_intermediate")}
    return keys, with_kept({**extra, **{name: own[name] for name in names}}, ssm_cfg=free, **sizes)


def _write_own(config: ModelConfig, dtype: str) -> dict[str, Any]:
    del dtype  # the release does not state it
    o, multiple = config.options(Mamba3Config), vocab_multiple(config)
    expand = config.num_heads * config.head_dim / config.hidden_size
    ssm = {
        "layer": "Mamba3",
        "d_state": o.state_size or config.head_dim,
        "expand": int(expand) if expand == int(expand) else expand,
        "headdim": config.head_dim,
        "ngroups": o.groups or config.num_heads,
        "rope_fraction": o.rope_fraction,
        "dt_min": o.dt_min,
        "dt_max": o.dt_max,
        "A_floor": o.decay_floor,
        "is_outproj_norm": o.out_norm,
        "is_mimo": o.rank > 1,
        **({"mimo_rank": o.rank} if o.rank > 1 else {}),
    }
    return {
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "attn_cfg": {},
        **others_of(config),
        "d_model": config.hidden_size,
        "d_intermediate": unpadded(config, "d_intermediate", config.intermediate_size, _MLP_MULTIPLE),
        "n_layer": config.num_layers,
        "vocab_size": unpadded(config, "vocab_size", config.vocab_size, multiple),
        "ssm_cfg": {**ssm, **kept_of(config, "ssm_cfg", {})},
        "attn_layer_idx": [],
        "rms_norm": not config.layer_norm,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def _fused(config: ModelConfig) -> dict[str, dict[str, int]]:
    return {"mlp.fc1": {f"mlp.{name}_proj": config.intermediate_size for name in ("up", "gate")}}


MAMBA3 = Family(
    _MODEL_TYPE,
    "MambaLMHeadModel",
    lambda hf: {"layer_norm": not hf["rms_norm"], "source_kinds": ("mamba3",)},
    lambda config: {"rms_norm": not config.layer_norm},
    defaults={"rms_norm": True, "rms_norm_eps": _NORM_EPS},
    fused=_fused,
    names={
        "model.norm.": "backbone.norm_f.",
        ".input_layernorm.": ".norm.",
        ".post_attention_layernorm.": ".norm2.",
        ".mlp.down_proj.": ".mlp.fc2.",
        ".mamba3.": ".mixer.",
        **NAMES,
    },
    keys=HYBRID_KEYS,
    own_layout=OwnLayout(lambda hf: "d_model" in hf and "ssm_cfg" in hf, _read_own, _write_own),
)
