"""Recurrent models in layouts of their own: what their families share.

Their config.json files are not transformers': keys have other names, and some are in nested objects, which their programs take as
they are. An object that has an unknown key is refused, because the key may change the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hybrid_jax.checks import check_boolean, check_known
from hybrid_jax.config import DiscreteMamba2Config, ModelConfig
from hybrid_jax.options import Check, choice, integer
from hybrid_jax.schema import mapping

# What `ModelConfig.extra` keeps of a released config.json that has no place of its own: sizes that the model rounds up, and options
# of mixers that change nothing here. Hybrids have it in their config.json.
KEPT = "released"
NAMES = {"model.embed_tokens.": "backbone.embedding.", "model.layers.": "backbone.layers."}

# Discrete Mamba-2's object in Llamba's and Phi-Mamba's config.json.
SSM_KEYS: dict[str, Check] = {
    "d_state": integer(),
    "n_qk_heads": integer(1, 2**16),
    "n_v_heads": integer(1, 2**16),
    "d_conv": integer(1, 1024),
    "expand": integer(1, 2**16),
    "activation": choice("identity", "silu", "swish"),
    "bias": check_boolean,
    "conv_bias": check_boolean,
    "chunk_size": integer(),
}
SSM_DEFAULTS = {
    "d_state": 64,
    "n_qk_heads": 32,
    "n_v_heads": 32,
    "d_conv": 4,
    "expand": 1,
    "activation": "identity",
    "bias": False,
    "conv_bias": True,
}


def only(expected: Any) -> Check:
    """Returns a check for a key that may have one value."""

    def checked(name: str, value: Any) -> Any:
        if (type(value), value) != (type(expected), expected):
            raise ValueError(f"{name} = {value!r} is not supported; only {expected!r} is")
        return value

    return checked


def read_object(
    name: str, values: Any, keys: Mapping[str, Check], defaults: Mapping[str, Any], required: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the checked values of an object of config.json, with defaults for keys that it leaves out.

    Args:
      name: of the object, for messages.
      keys: all keys that it may have, and the check of each.
      required: those that it must have.

    Raises:
      ValueError: it is no object, has an unknown key or a wrong value, or lacks a key.
    """
    given = mapping(name, values)
    check_known(name, given, keys)
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    return {key: keys[key](f"{name}.{key}", value) for key, value in {**defaults, **given}.items()}


def read_keys(
    hf: Mapping[str, Any], keys: Mapping[str, Check], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the checked values of config.json's own keys, with defaults, and its other keys as they are.

    Raises:
      ValueError: a wrong value, or a key without a default is absent.
    """
    values = {**defaults, **{key: value for key, value in hf.items() if key in keys}}
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    others = {key: value for key, value in hf.items() if key not in keys}
    return {key: keys[key](key, value) for key, value in values.items()}, others


def _kept_object(name: str, value: Any) -> dict[str, Any]:
    sizes = dict.fromkeys(("vocab_size", "pad_vocab_size_multiple", "d_intermediate"), integer())
    return read_object(name, value, {**sizes, "ssm_cfg": mapping, "attention": mapping}, {})


HYBRID_KEYS: dict[str, Check] = {KEPT: _kept_object}  # `Family.keys` of a family with such a config.json


def with_kept(others: Mapping[str, Any], **kept: Any) -> dict[str, Any]:
    """Returns `extra`: the keys of a released config.json that are not read, and what is kept of those that are.

    Raises:
      ValueError: it has the key that is ours.
    """
    if KEPT in others:
        raise ValueError(f"config.json has the key {KEPT!r}, which only hybrids of released models have; remove it")
    return {**others, KEPT: {name: value for name, value in kept.items() if value}}


def kept_of(config: ModelConfig, name: str, default: Any) -> Any:
    """Returns what is kept under a name, or the default."""
    return config.extra.get(KEPT, {}).get(name, default)


def others_of(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of the released config.json that are not read."""
    return {key: value for key, value in config.extra.items() if key != KEPT}


def padded(size: int, multiple: int) -> int:
    """Returns a size, rounded up to a multiple."""
    return -(-size // multiple) * multiple


def unpadded(config: ModelConfig, key: str, size: int, multiple: int) -> int:
    """Returns the size that config.json had under a key if it is rounded up to `size`, or else `size`."""
    given = kept_of(config, key, size)
    return given if padded(given, multiple) == size else size


def vocab_multiple(config: ModelConfig) -> int:
    """Returns `pad_vocab_size_multiple`: what came in, or else 8, the usual one, where the vocabulary is a multiple of it."""
    return kept_of(config, "pad_vocab_size_multiple", 1 if config.vocab_size % 8 else 8)


def of_discrete_mamba2(name: str, ssm: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Returns transformers' keys of the heads, and the mixer's options, of a checked Discrete Mamba-2 object.

    Raises:
      ValueError: its numbers of heads do not divide what they must.
    """
    inner, heads, keys = ssm["expand"] * hidden_size, ssm["n_v_heads"], ssm["n_qk_heads"]
    if inner % heads:
        raise ValueError(f"{name}.n_v_heads must divide expand * d_model ({inner}), got {heads}")
    if heads % keys:
        raise ValueError(f"{name}.n_qk_heads must divide n_v_heads ({heads}), got {keys}")
    head_dim = inner // heads
    options = {
        "state_size": None if ssm["d_state"] == head_dim else ssm["d_state"],
        "qk_heads": None if keys == heads else keys,
        "conv_size": ssm["d_conv"],
        "conv_bias": ssm["conv_bias"],
        "conv_activation": ssm["activation"] != "identity",
        "bias": ssm["bias"],
    }
    return {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim, DiscreteMamba2Config.KEY: options}


def write_discrete_mamba2(config: ModelConfig) -> dict[str, Any]:
    """Returns the Discrete Mamba-2 object of a model.

    Raises:
      ValueError: its heads together are no multiple of the hidden size.
    """
    o, inner = config.options(DiscreteMamba2Config), config.num_heads * config.head_dim
    if inner % config.hidden_size:
        raise ValueError(
            f"config.json of a {config.family} cannot describe this model: its heads have {inner} channels together, which must be "
            f"a multiple of hidden_size, {config.hidden_size}"
        )
    return {
        "d_state": o.state_size or config.head_dim,
        "n_qk_heads": o.qk_heads or config.num_heads,
        "n_v_heads": config.num_heads,
        "d_conv": o.conv_size,
        "expand": inner // config.hidden_size,
        "activation": "silu" if o.conv_activation else "identity",
        "bias": o.bias,
        "conv_bias": o.conv_bias,
    }
