"""Llamba (arXiv 2502.14458): Llama with Discrete Mamba-2 in place of attention, in the layout of its release.

config.json is read from `vocab_size`, rounded up to `pad_vocab_size_multiple`, `d_model`, `n_layer`, `tie_embeddings`,
`lm_head_bias`, `mlp_cfg` (`intermediate_size`, `bias`) and `ssm_cfg` (sizes, heads, biases and activation of the mixer).
`norm_epsilon` must be 1e-5, which the norms in the layers have whatever it says, `act_fn` "silu" and `lm_head_prenorm` "rms".
`chunk_size` and `resid_dropout` change nothing that is computed here; they and all other keys are written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.checks import check_boolean
from hybrid_jax.config import ModelConfig
from hybrid_jax.families.base import Family, OwnLayout
from hybrid_jax.families.released import (
    HYBRID_KEYS,
    NAMES,
    SSM_DEFAULTS,
    SSM_KEYS,
    kept_of,
    of_discrete_mamba2,
    only,
    others_of,
    padded,
    read_keys,
    read_object,
    unpadded,
    vocab_multiple,
    with_kept,
    write_discrete_mamba2,
)
from hybrid_jax.options import integer
from hybrid_jax.schema import KEYS, SIZE, mapping

_NORM_EPS = 1e-5
_KEYS = {
    "model_type": only("llamba"),
    "vocab_size": KEYS["vocab_size"],
    "d_model": SIZE,
    "n_layer": KEYS["num_hidden_layers"],
    "tie_embeddings": check_boolean,
    "lm_head_bias": check_boolean,
    "pad_vocab_size_multiple": integer(),
    "norm_epsilon": only(_NORM_EPS),
    "lm_head_prenorm": only("rms"),
    "mlp_cfg": mapping,
    "ssm_cfg": mapping,
}
_DEFAULTS = {
    "n_layer": 32,
    "tie_embeddings": False,
    "lm_head_bias": False,
    "pad_vocab_size_multiple": 8,
    "norm_epsilon": _NORM_EPS,
    "lm_head_prenorm": "rms",
}
_MLP_KEYS = {"intermediate_size": SIZE, "bias": check_boolean, "act_fn": only("silu")}
_MLP_DEFAULTS = {"bias": False, "act_fn": "silu"}


def _read_own(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    given = {key: value for key, value in hf.items() if value is not None or key not in ("mlp_cfg", "ssm_cfg")}
    absent = {"mlp_cfg": {"intermediate_size": 14336}, "ssm_cfg": {}}  # as in the release, where the object is absent or null
    own, extra = read_keys(given, _KEYS, {**_DEFAULTS, **absent})
    mlp = read_object("mlp_cfg", own["mlp_cfg"], _MLP_KEYS, _MLP_DEFAULTS, required=("intermediate_size",))
    ssm = read_object("ssm_cfg", own["ssm_cfg"], SSM_KEYS, SSM_DEFAULTS)
    vocab = padded(own["vocab_size"], own["pad_vocab_size_multiple"])
    keys = {
        "vocab_size": vocab,
        "hidden_size": own["d_model"],
        "num_hidden_layers": own["n_layer"],
        "intermediate_size": mlp["intermediate_size"],
        "mlp_bias": mlp["bias"],
        "tie_word_embeddings": own["tie_embeddings"],
        "lm_head_bias": own["lm_head_bias"],
        "rms_norm_eps": _NORM_EPS,
        "hybrid_override_pattern": "-".join(["DM2"] * own["n_layer"]),
        **of_discrete_mamba2("ssm_cfg", ssm, own["d_model"]),
    }
    sizes = {key: own[key] for key in ("vocab_size", "pad_vocab_size_multiple")}
    prenorm = {"lm_head_prenorm": "rms"} if "lm_head_prenorm" in hf else {}
    return keys, with_kept({**extra, **prenorm}, ssm_cfg={key: ssm[key] for key in ("chunk_size",) if key in ssm}, **sizes)


def _write_own(config: ModelConfig, dtype: str) -> dict[str, Any]:
    multiple = vocab_multiple(config)
    return {
        "architectures": ["LlambaLMHeadModel"],
        "dtype": dtype,
        **others_of(config),
        "model_type": "llamba",
        "vocab_size": unpadded(config, "vocab_size", config.vocab_size, multiple),
        "pad_vocab_size_multiple": multiple,
        "d_model": config.hidden_size,
        "n_layer": config.num_layers,
        "tie_embeddings": config.tie_embeddings,
        "lm_head_bias": config.head_bias,
        "norm_epsilon": _NORM_EPS,
        "mlp_cfg": {"intermediate_size": config.intermediate_size, "bias": config.mlp_bias, "act_fn": "silu"},
        "ssm_cfg": {**write_discrete_mamba2(config), **kept_of(config, "ssm_cfg", {})},
    }


LLAMBA = Family(
    "llamba",
    "LlambaLMHeadModel",
    lambda hf: {
        "mlp_bias": hf["mlp_bias"],
        "head_bias": hf["lm_head_bias"],
        "source_kinds": ("discrete_mamba2",),
    },
    lambda config: {"mlp_bias": config.mlp_bias, "lm_head_bias": config.head_bias},
    defaults={"mlp_bias": False, "lm_head_bias": False, "rms_norm_eps": _NORM_EPS},
    names={"model.norm.": "backbone.final_layernorm.", ".discrete_mamba2.": ".mixer.", **NAMES},
    keys=HYBRID_KEYS,
    own_layout=OwnLayout(lambda hf: False, _read_own, _write_own),
)
