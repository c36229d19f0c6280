"""Qwen3-Next and Qwen3.5 text: Gated DeltaNet in most layers, attention with an output gate in the others.

Qwen3-Next has experts beside a shared one, and tensors in which queries, keys, values and gates alternate by heads; Qwen3.5 is
dense or has such experts in every layer, and its tensors hold them one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hybrid_jax.config import GDNConfig, ModelConfig
from hybrid_jax.families.base import Family, dense_layers, expert_counts, read_moe, write_moe
from hybrid_jax.schema import integer

_SYMBOLS = {"linear_attention": "GDN", "full_attention": "*"}
_TYPES = {"gdn": "linear_attention"}
_GDN_KEYS = {
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_key_head_dim": "state_size",
    "linear_value_head_dim": "value_size",
    "linear_conv_kernel_dim": "conv_size",
}


def _layers(hf) -> list[str] | None:
    """The symbols of `layer_types`, unless they are a hybrid's; absent: attention in every `full_attention_interval`th layer."""
    types, count = hf["layer_types"], hf["num_hidden_layers"]
    if types is None:
        return ["*" if (i + 1) % hf.get("full_attention_interval", 4) == 0 else "GDN" for i in range(count)]
    if "sliding_attention" in types:
        raise ValueError(
            f"layer_types[{types.index('sliding_attention')}] = 'sliding_attention' is not supported; a layer of a "
            f"{hf['model_type']} is one of {', '.join(map(repr, _SYMBOLS))}"
        )
    if not set(types) <= set(_SYMBOLS):
        return None
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers is {count}")
    return [_SYMBOLS[t] for t in types]


def _mixers(hf) -> dict[str, dict[str, Any]]:
    """The options of its Gated DeltaNet: gates, convolutions and what their tensors hold cannot be chosen."""
    fixed = {"norm_eps": hf["rms_norm_eps"], "conv_bias": False, "use_gate": True, "use_short_conv": True}
    return {"gdn_config": {**{ours: hf[theirs] for theirs, ours in _GDN_KEYS.items()}, **fixed}}


def _read(hf):
    bias = hf["attention_bias"]
    return {
        "qk_norm": True,
        "norm_offset": 1.0,
        "attention_gate": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "source_kinds": tuple(_TYPES),
    }


def _with_experts(hf, num_experts: int, **fixed: Any):
    moe = read_moe({**hf, "mlp_only_layers": [], "decoder_sparse_step": 1, **fixed}, num_experts)
    return {**_read(hf), "moe": dataclasses.replace(moe, shared_intermediate_size=hf["shared_expert_intermediate_size"])}


def _write(config: ModelConfig):
    gdn = config.options(GDNConfig)
    return {
        "attention_bias": config.qkv_bias,
        "layer_types": [_TYPES.get(layer.kind, "full_attention") for layer in config.layers],
        "partial_rotary_factor": config.rope.option("partial_rotary_factor", 1.0),
        **{theirs: getattr(gdn, ours) for theirs, ours in _GDN_KEYS.items()},
    }


def _shared(config: ModelConfig) -> dict[str, int | None]:
    return {"shared_expert_intermediate_size": config.moe.shared_intermediate_size if config.moe else None}


def _write_experts(config: ModelConfig):
    step, listed = config.extra.get("decoder_sparse_step", 1), config.extra.get("mlp_only_layers") or ()
    dense = [i for i, is_dense in enumerate(config.dense_layers) if is_dense and (i in listed or (i + 1) % step == 0)]
    return {**_write(config), **write_moe(config), **_shared(config), "decoder_sparse_step": step, "mlp_only_layers": dense}


def _of_attention(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The tensor of queries and gates, which alternate head by head."""
    width = config.num_heads * config.head_dim
    return {"self_attn.q_proj": {"self_attn.q_proj": width, "self_attn.g_proj": width}}


def _fused(config: ModelConfig) -> dict[str, dict[str, int]]:
    gdn = config.options(GDNConfig)
    keys, values = ((n or 0) * (size or 0) for n, size in ((gdn.key_heads, gdn.state_size), (gdn.value_heads, gdn.value_size)))
    widths = {"q": keys, "k": keys, "v": values}
    return {
        **_of_attention(config),
        "linear_attn.conv1d": {f"gdn.{x}_conv1d": width for x, width in widths.items()},
        "linear_attn.in_proj_qkv": {f"gdn.{x}_proj": width for x, width in widths.items()},
    }


def _fused_by_heads(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Those of Qwen3-Next, whose groups are the key heads."""
    fused, H = _fused(config), config.options(GDNConfig).value_heads or 0
    projections = fused.pop("linear_attn.in_proj_qkv")
    return {
        **fused,
        "linear_attn.in_proj_qkvz": {**projections, "gdn.g_proj": projections["gdn.v_proj"]},
        "linear_attn.in_proj_ba": {"gdn.b_proj": H, "gdn.gk_proj": H},
    }


def _groups(config: ModelConfig) -> dict[str, int]:
    key_heads = config.options(GDNConfig).key_heads or 1
    return {
        "self_attn.q_proj": config.num_heads,
        **dict.fromkeys(("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"), key_heads),
    }


_NAMES = {".gdn.o_norm.": ".linear_attn.norm.", ".gdn.o_proj.": ".linear_attn.out_proj.", ".gdn.": ".linear_attn."}
_PROJECTIONS = {f".gdn.{ours}_proj.": f".linear_attn.in_proj_{theirs}." for ours, theirs in (("g", "z"), ("b", "b"), ("gk", "a"))}
_DEFAULTS = {
    "head_dim": 256,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
}

QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    lambda hf: {**_with_experts(hf, 512), "dense_layers": dense_layers(hf)},
    _write_experts,
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": 2,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
    },
    keys={"head_dim": integer(), "decoder_sparse_step": integer()},
    partial_rotary=True,
    fused=_fused_by_heads,
    groups=_groups,
    names=_NAMES,
    ignored=("mtp.",),
    layers=_layers,
    mixers=_mixers,
)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _read,
    _write,
    defaults={**_DEFAULTS, "num_key_value_heads": 4},
    keys={"head_dim": integer()},
    partial_rotary=True,
    position_axes=True,
    fused=_fused,
    groups=_groups,
    names={**_PROJECTIONS, **_NAMES},
    ignored=("mtp.", "model.visual."),
    wrapper="qwen3_5",
    wrapped={"model.": "model.language_model."},
    layers=_layers,
    mixers=_mixers,
)
QWEN3_5_MOE = dataclasses.replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    wrapper="qwen3_5_moe",
    read=lambda hf: _with_experts(hf, 256, norm_topk_prob=True),
    write=lambda config: {**_write(config), **expert_counts(config, "num_experts"), **_shared(config)},
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    intermediate_key="moe_intermediate_size",  # no layer is dense
)
