"""Phi-Mamba and Hybrid Phi-Mamba (arXiv 2408.10189): Phi's block with Discrete Mamba-2 in place of attention, in the layout of its
release.

config.json has no `model_type`; it is read from `LanguageModel.input` (`vocab_size`, rounded up to `pad_vocab_size_multiple`),
`MixerModel.input` (`d_model`, `n_layer`) and one object `Block...` for each run of equal layers, in order: `n_layers`, `CoreType`
(of Discrete Mamba-2 or of Phi's attention) and `core_input`, the mixer's options, which must be the same in all blocks of a kind.
The MLP is four times as wide as the model, all norms are LayerNorms with an epsilon of 1e-5, and everything but the mixer has
biases.

The released program gives attention the defaults of Phi's config whatever `core_input` says; `core_input` may state others here,
under Phi's names, and those that are not the defaults are written. `chunk_size` and how attention is computed change nothing here
and are written back. Dropout must be 0. Keys that are not known are refused inside of objects, and written back beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from hybrid_jax.checks import check_boolean, check_number
from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.families.base import Family, OwnLayout
from hybrid_jax.families.phi import PHI
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
    read_object,
    unpadded,
    vocab_multiple,
    with_kept,
    write_discrete_mamba2,
)
from hybrid_jax.options import choice, integer
from hybrid_jax.schema import KEYS, SIZE, mapping

_MIXERS = {"DM2": "modules.mixers.discrete_mamba2", "*": "modules.mixers.phi_attention"}
_SYMBOLS = {core: symbol for symbol, core in _MIXERS.items()}
_BLOCK = "modules.phi_block"
_INPUT = {"input": mapping}
_LANGUAGE_KEYS = {
    "vocab_size": KEYS["vocab_size"],
    "pad_vocab_size_multiple": integer(),
    "tie_embeddings": only(False),
    "lm_head_bias": only(True),
}
_MODEL_KEYS = {"d_model": SIZE, "n_layer": KEYS["num_hidden_layers"], "lm_head_prenorm": only("layer")}
_BLOCK_KEYS = {
    "n_layers": KEYS["num_hidden_layers"],
    "BlockType": only(_BLOCK),
    "block_input": mapping,
    "CoreType": choice(*_SYMBOLS),
    "core_input": mapping,
}


def _no_dropout(name: str, value: Any) -> float:
    if check_number(name, value) != 0:
        raise ValueError(f"{name} must be 0, because there is no dropout here, got {value!r}")
    return 0.0


# Of attention's core_input: Phi's own keys with its defaults, and how the released program computes.
_PHI_DEFAULTS = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 2048,
}
_ATTENTION_KEYS = {
    **{key: KEYS[key] for key in _PHI_DEFAULTS},
    "attn_type": choice("eager", "flash_attention_2"),
    "flash_attention": check_boolean,
}


def _blocks(hf: Mapping[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """Returns every block's symbol, number of layers and checked core_input."""
    found = []
    for name in (key for key in hf if key.startswith("Block")):
        block = read_object(
            name, hf[name], _BLOCK_KEYS, {"block_input": {}, "core_input": {}}, ("n_layers", "BlockType", "CoreType")
        )
        read_object(f"{name}.block_input", block["block_input"], {"resid_dropout": _no_dropout}, {})
        symbol = _SYMBOLS[block["CoreType"]]
        keys, defaults = (SSM_KEYS, SSM_DEFAULTS) if symbol == "DM2" else (_ATTENTION_KEYS, _PHI_DEFAULTS)
        core = read_object(f"{name}.core_input", block["core_input"], keys, defaults)
        first = next((other for kind, _, other in found if kind == symbol), core)
        if wrong := [key for key in {**first, **core} if first.get(key) != core.get(key)]:
            raise ValueError(
                f"{name}.core_input.{wrong[0]} is {core.get(wrong[0])!r}, and {first.get(wrong[0])!r} in another block of its "
                "kind; all layers of a kind must have the same options"
            )
        found.append((symbol, block["n_layers"], core))
    return found


def _read_own(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {}
    for name, keys, required in (
        ("LanguageModel", _LANGUAGE_KEYS, ("vocab_size", "pad_vocab_size_multiple")),
        ("MixerModel", _MODEL_KEYS, ("d_model", "n_layer", "lm_head_prenorm")),
    ):
        outer = read_object(name, hf.get(name, {}), _INPUT, {}, required=("input",))
        inputs[name] = read_object(f"{name}.input", outer["input"], keys, {}, required)
    language, model, blocks = inputs["LanguageModel"], inputs["MixerModel"], _blocks(hf)
    layers = sum(count for _, count, _ in blocks)
    if layers != model["n_layer"]:
        raise ValueError(f"MixerModel.input.n_layer is {model['n_layer']}, the blocks have {layers} layers")
    cores = {symbol: core for symbol, _, core in blocks}
    vocab, hidden = padded(language["vocab_size"], language["pad_vocab_size_multiple"]), model["d_model"]
    keys = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "hybrid_override_pattern": "-".join(symbol for symbol, count, _ in blocks for _ in range(count)),
    }
    if "DM2" in cores:
        keys |= of_discrete_mamba2("core_input", cores["DM2"], hidden)
    if "*" in cores:
        keys |= _of_attention(cores["*"], keys, hidden)
    known = {"LanguageModel", "MixerModel", *(key for key in hf if key.startswith("Block"))}
    others = {key: value for key, value in hf.items() if key not in known}
    sizes = {key: language[key] for key in ("vocab_size", "pad_vocab_size_multiple")}
    return keys, with_kept(others, ssm_cfg=_free(cores.get("DM2", {})), attention=_free(cores.get("*", {})), **sizes)


def _of_attention(core: Mapping[str, Any], keys: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """Returns transformers' keys of attention.

    Raises:
      ValueError: it contradicts the model, or the mixers in the other layers.
    """
    if core["hidden_size"] != hidden:
        raise ValueError(
            f"a Phi-Mamba with attention has core_input.hidden_size = {core['hidden_size']} there (2048 if it is absent), and "
            f"MixerModel.input.d_model = {hidden}; give both the same value"
        )
    heads = {"num_attention_heads": core["num_attention_heads"], "head_dim": hidden // core["num_attention_heads"]}
    for name, value in heads.items():
        if keys.get(name, value) != value:
            raise ValueError(
                f"attention has {name} {value}, Discrete Mamba-2 {keys[name]}; layers with other numbers of heads are not supported"
            )
    if hidden % core["num_attention_heads"]:
        raise ValueError(f"core_input.num_attention_heads must divide hidden_size ({hidden}), got {core['num_attention_heads']}")
    names = ("rope_theta", "partial_rotary_factor", "max_position_embeddings")
    return {**heads, "num_key_value_heads": heads["num_attention_heads"], **{name: core[name] for name in names}}


def _free(core: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what changes nothing that is computed here."""
    return {key: core[key] for key in ("chunk_size", "attn_type", "flash_attention") if key in core}


def _write_own(config: ModelConfig, dtype: str) -> dict[str, Any]:
    del dtype  # the release does not state it
    multiple, blocks = vocab_multiple(config), {}
    attention = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "rope_theta": config.rope.theta,
        "partial_rotary_factor": config.rope.option("partial_rotary_factor", 1.0),
        "max_position_embeddings": config.max_position_embeddings,
    }
    for number, (kind, run) in enumerate(groupby(layer.kind for layer in config.layers), start=1):
        if kind == ATTENTION:
            stated = {key: value for key, value in attention.items() if value != _PHI_DEFAULTS[key]}
            symbol, core = "*", {**stated, **kept_of(config, "attention", {})}
        else:
            symbol, core = "DM2", {**write_discrete_mamba2(config), **kept_of(config, "ssm_cfg", {})}
        blocks[f"Block{number}"] = {
            "n_layers": len(list(run)),
            "BlockType": _BLOCK,
            "block_input": {"resid_dropout": 0.0},
            "CoreType": _MIXERS[symbol],
            "core_input": core,
        }
    vocab = {"vocab_size": unpadded(config, "vocab_size", config.vocab_size, multiple), "pad_vocab_size_multiple": multiple}
    return {
        **others_of(config),
        "LanguageModel": {"input": vocab},
        "MixerModel": {"input": {"d_model": config.hidden_size, "n_layer": config.num_layers, "lm_head_prenorm": "layer"}},
        **blocks,
    }


PHI_MAMBA = Family(
    "phi_mamba",
    "LMHeadModel",
    lambda hf: {**PHI.read(hf), "source_kinds": ("discrete_mamba2",)},
    PHI.write,
    defaults=PHI.defaults,
    partial_rotary=True,
    names={
        "model.norm.": "backbone.final_layernorm.",
        **{ours: theirs for ours, theirs in PHI.names.items() if ours != "model.norm."},
        ".self_attn.": ".mixer.self_attn.",
        ".discrete_mamba2.": ".mixer.",
        **NAMES,
    },
    norm_eps_key=PHI.norm_eps_key,
    activations=PHI.activations,
    keys=HYBRID_KEYS,
    own_layout=OwnLayout(lambda hf: "LanguageModel" in hf and "MixerModel" in hf, _read_own, _write_own),
)
