"""Patterns from scores: so many of the layers, so many of the heads, or as few layers as fit in so many bytes.

In each the cheapest are converted first, and at equal costs the earlier ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hybrid_jax.config import ATTENTION, MixerSpec, ModelConfig, parse_pattern
from hybrid_jax.memory import state_bytes


def pattern_from_scores(scores: Sequence[float], mixer: str, fraction: float) -> str:
    """Returns the pattern that converts the cheapest `fraction` of the layers; ties go to the earlier layer.

    Args:
      scores: the cost of converting each layer.
      mixer: symbol of the mixer that replaces attention.
      fraction: fraction of the layers to convert, rounded to a number of layers.

    Raises:
      ValueError: a score is not finite, so that there is no order, or the fraction is less than half a layer.
    """
    _check_finite(np.asarray(scores))
    if not round(fraction * len(scores)):
        raise ValueError(
            f"select.fraction {fraction} of {len(scores)} layers is none, so nothing would be converted; set it to at least "
            f"{1 / len(scores):.3g}"
        )
    cheapest = sorted(range(len(scores)), key=lambda i: (scores[i], i))[: round(fraction * len(scores))]
    return "-".join(mixer if i in cheapest else "*" for i in range(len(scores)))


def pattern_of_heads(costs: np.ndarray, mixer: str, fraction: float) -> str:
    """Returns the pattern that converts the cheapest `fraction` of all layers' heads; the most costly heads stay attention.

    A layer without such heads is the mixer, one of which all heads stay is attention, and the others are `MIXER[3,17]`.

    Args:
      costs: [layers, heads], the cost of converting each head.
      mixer: symbol of a recurrent mixer.
      fraction: fraction of the heads to convert, rounded to a number of heads.

    Raises:
      ValueError: a cost is not finite, or the fraction is less than half a head.
    """
    _check_finite(costs)
    if not (count := round(fraction * costs.size)):
        raise ValueError(
            f"select.fraction {fraction} of {costs.size} heads is none, so nothing would be converted; set it to at least "
            f"{1 / costs.size:.3g}"
        )
    kept = np.ones(costs.size, bool)
    kept[np.argsort(costs.ravel(), kind="stable")[:count]] = False
    symbols = []
    for of_layer in kept.reshape(costs.shape):
        heads = ",".join(map(str, np.flatnonzero(of_layer)))
        symbols.append("*" if of_layer.all() else f"{mixer}[{heads}]" if heads else mixer)
    return "-".join(symbols)


def pattern_of_bytes(scores: Sequence[float], mixer: str, config: ModelConfig, most: int, tokens: int) -> str:
    """Returns the pattern that converts as few layers, cheapest first, as it takes to hold `tokens` tokens in `most` bytes.

    Layers that would hold more bytes than before are not converted.

    Args:
      scores: the cost of converting each layer.
      mixer: symbol of the mixer that replaces attention, with the options that `config` has for it.
      config: of the source.
      most: bytes of one sequence's keys, values (in bfloat16) and states, of all layers.
      tokens: that there is room for.

    Raises:
      ValueError: a score is not finite; the source holds no more bytes than that; or no conversion gets below it.
    """
    _check_finite(np.asarray(scores))
    (converted,) = parse_pattern(mixer)
    before = [_layer_bytes(config, i, spec, tokens) for i, spec in enumerate(config.layers)]
    saved = [b - _layer_bytes(config, i, converted, tokens) for i, b in enumerate(before)]
    held, chosen = sum(before), set()
    if held <= most:
        raise ValueError(
            f"select.state_bytes {most:,}: the source holds {held:,} bytes at {tokens:,} tokens, so nothing would be converted; "
            "set fewer bytes or more tokens"
        )
    for i in np.argsort(scores, kind="stable").tolist():
        if saved[i] <= 0:
            continue
        held -= saved[i]
        chosen.add(i)
        if held <= most:
            return "-".join(mixer if i in chosen else layer.symbol for i, layer in enumerate(config.layers))
    raise ValueError(
        f"select.state_bytes {most:,}: with {mixer} in every layer where it saves bytes the model holds {held:,} bytes at "
        f"{tokens:,} tokens; set at least as many"
    )


def converted(pattern: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns which layers [layers], or which heads [layers, heads], a pattern converts, as booleans."""
    found = np.zeros(shape, bool)
    for i, spec in enumerate(parse_pattern(pattern)):
        if spec.kind != ATTENTION:
            found[i] = True
            if len(shape) == 2:
                found[i, list(spec.attention_heads)] = False
    return found


def _check_finite(scores: np.ndarray) -> None:
    """Refuses scores without an order."""
    if len(bad := np.argwhere(~np.isfinite(scores))):
        where = f"layer {bad[0][0]}" + (f", head {bad[0][1]}," if scores.ndim == 2 else "")
        raise ValueError(f"the score of {where} is {scores[tuple(bad[0])]}, so the layers cannot be ranked")


def _layer_bytes(config: ModelConfig, layer: int, spec: MixerSpec, tokens: int) -> int:
    """Returns the bytes of one sequence of so many tokens in a layer, if its mixer were that of `spec`."""
    of_layers = dict(attention_windows=(config.attention_windows[layer],), rotary_layers=(), dense_layers=())
    alone = dataclasses.replace(config, layers=(spec,), **of_layers)
    return state_bytes(alone, tokens)
