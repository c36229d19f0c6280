"""Rotary embeddings in config.json: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (before)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.config import ModelConfig, RopeConfig
from hybrid_jax.schema import check_key, check_rope

DEFAULT_THETA = 10_000.0
LAYER_TYPES = FULL, WINDOWED = "full_attention", "sliding_attention"


def read_rope(
    hf: Mapping[str, Any],
    absent: Mapping[str, Any] | None = None,
    base: float = DEFAULT_THETA,
    *,
    partial: bool = False,
    names: Mapping[str, str] | None = None,
    position_axes: bool = False,
) -> RopeConfig:
    """The rotary embedding of a config.json, with transformers 5.23's precedence.

    `rope_scaling`, unless empty, comes before `rope_parameters`; what it lacks of `rope_theta` and
    `partial_rotary_factor` comes from the top level. An `original_max_position_embeddings` at the top level comes before
    the one in the dict; where there is none it is `max_position_embeddings`.

    Args:
      hf: a config.json, checked against the schema.
      absent: the family's own parameters where config.json has neither dict.
      base: the family's `rope_theta` where config.json has none.
      partial: the family honours `partial_rotary_factor`.
      names: the family's other names of rope types -> ours.
      position_axes: the family knows `mrope_section`, see `Family`.

    Raises:
      ValueError: an unsupported type, parameters per layer type, a missing or wrong value, two bases that differ.
    """
    given = hf.get("rope_parameters")
    values = dict(hf.get("rope_scaling") or (absent or {} if given is None else given))
    if "rope_theta" in hf and given and hf["rope_theta"] != values.get("rope_theta", hf["rope_theta"]):
        raise ValueError(
            f"rope_theta is {hf['rope_theta']!r}, and {values['rope_theta']!r} among the rope parameters, which is what "
            "transformers takes: give both the same value, or leave one out"
        )
    theta = values.pop("rope_theta", hf.get("rope_theta", base))
    old = values.pop("type", "default")
    kind: Any = values.pop("rope_type", old)
    if isinstance(kind, str):
        kind = (names or {}).get(kind, kind)
    fraction = values.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if check_key("partial_rotary_factor", fraction) not in (None, 1) and not partial:
        raise ValueError(f"partial_rotary_factor = {fraction!r} is not supported; only 1 is")
    if fraction not in (None, 1):
        values["partial_rotary_factor"] = fraction
    check_key("rope_theta", theta)
    if "mrope_section" in values and not position_axes:
        raise ValueError("rope_parameters.mrope_section is not supported: positions of the family have one axis; remove it")
    if kind in ("llama3", "yarn", "longrope"):
        context = values.get("original_max_position_embeddings", hf["max_position_embeddings"])
        values["original_max_position_embeddings"] = hf.get("original_max_position_embeddings", context)
    check_rope(kind, values)
    return RopeConfig(float(theta), kind, tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())))


def read_ropes(hf: Mapping[str, Any], base: float, window_base: float, window_key: str) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of a family with rope parameters per layer type: of layers without and with a window.

    `rope_scaling` and `rope_theta`, of older files, are those of layers without a window.

    Args:
      base, window_base: the family's bases where config.json has none.
      window_key: the key of older files for the base of layers with a window; empty: `rope_theta` was theirs too, and must be the
        family's, because transformers 5 does not give it to them any more.

    Raises:
      ValueError: parameters that are not per layer type, or what `read_rope` refuses.
    """
    given = hf.get("rope_parameters") or {}
    if wrong := [name for name, value in given.items() if name not in LAYER_TYPES or not isinstance(value, Mapping | None)]:
        raise ValueError(f"rope_parameters must have an object for each of {' and '.join(LAYER_TYPES)}, got {wrong[0]!r}")
    if not window_key and "rope_theta" in hf and not given and hf["rope_theta"] != base:
        raise ValueError(
            f"rope_theta = {hf['rope_theta']!r} without rope_parameters means other bases of windowed layers in old and new "
            f"versions of transformers; give rope_parameters for {' and '.join(LAYER_TYPES)}"
        )
    shared = {name: hf[name] for name in ("max_position_embeddings", "partial_rotary_factor") if name in hf}
    full = {"rope_theta": hf.get("rope_theta", base), **(given.get(FULL) or {}), **(hf.get("rope_scaling") or {})}
    window = {"rope_theta": hf.get(window_key, window_base), **(given.get(WINDOWED) or {})}
    rope, window_rope = (read_rope({**shared, "rope_parameters": values}) for values in (full, window))
    return rope, window_rope


def read_query_scaling(rope: RopeConfig) -> tuple[float, int] | None:
    """Ministral-3's scaling of the queries, which it keeps among the rope parameters.

    Raises:
      ValueError: `llama_4_scaling_beta` without `original_max_position_embeddings`.
    """
    beta, context = rope.option("llama_4_scaling_beta"), rope.option("original_max_position_embeddings")
    if beta is None:
        return None
    if context is None:
        raise ValueError("rope_parameters.llama_4_scaling_beta needs rope_parameters.original_max_position_embeddings")
    return beta, context


def _parameters(rope: RopeConfig) -> dict[str, Any]:
    """One complete set of rope parameters."""
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in rope.options}
    return {**options, "rope_theta": rope.theta, "rope_type": rope.kind}


def write_rope(config: ModelConfig, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`, complete, and `rope_theta`; where layers with a window have others, `rope_parameters` per layer type.

    There is no `rope_scaling`: transformers would take it before `rope_parameters`, so that an edit of the latter would
    do nothing. With `rope_theta` at the top level, a `rope_scaling` added by hand keeps the model's base.

    Args:
      partial: the family honours `partial_rotary_factor`, so it is written also where it is 1.
    """
    if config.window_rope is not None:
        return {"rope_parameters": {FULL: _parameters(config.rope), WINDOWED: _parameters(config.window_rope)}}
    options = _parameters(config.rope)
    if partial:
        options.setdefault("partial_rotary_factor", 1.0)
    if config.query_scaling is not None:
        beta, context = config.query_scaling
        options |= {"llama_4_scaling_beta": beta, "original_max_position_embeddings": context}
    return {"rope_parameters": options, "rope_theta": config.rope.theta}
