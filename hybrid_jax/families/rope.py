"""Rotary embeddings in config.json: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (before)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.config import ModelConfig, RopeConfig
from hybrid_jax.schema import check_key, check_rope

DEFAULT_THETA = 10_000.0


def read_rope(
    hf: Mapping[str, Any],
    absent: Mapping[str, Any] | None = None,
    base: float = DEFAULT_THETA,
    *,
    partial: bool = False,
    names: Mapping[str, str] | None = None,
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
    kind = (names or {}).get(kind, kind)
    fraction = values.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if check_key("partial_rotary_factor", fraction) not in (None, 1) and not partial:
        raise ValueError(f"partial_rotary_factor = {fraction!r} is not supported; only 1 is")
    if fraction not in (None, 1):
        values["partial_rotary_factor"] = fraction
    check_key("rope_theta", theta)
    if kind in ("llama3", "yarn", "longrope"):
        context = values.get("original_max_position_embeddings", hf["max_position_embeddings"])
        values["original_max_position_embeddings"] = hf.get("original_max_position_embeddings", context)
    check_rope(kind, values)
    return RopeConfig(float(theta), kind, tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())))


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


def write_rope(config: ModelConfig, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`, complete, and `rope_theta`.

    There is no `rope_scaling`: transformers would take it before `rope_parameters`, so that an edit of the latter would
    do nothing. With `rope_theta` at the top level, a `rope_scaling` added by hand keeps the model's base.

    Args:
      partial: the family honours `partial_rotary_factor`, so it is written also where it is 1.
    """
    rope = config.rope
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in rope.options}
    if partial:
        options.setdefault("partial_rotary_factor", 1.0)
    if config.query_scaling is not None:
        beta, context = config.query_scaling
        options |= {"llama_4_scaling_beta": beta, "original_max_position_embeddings": context}
    return {"rope_parameters": {**options, "rope_theta": rope.theta, "rope_type": rope.kind}, "rope_theta": rope.theta}
