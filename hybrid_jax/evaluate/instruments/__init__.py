"""Instruments by name. An instrument is one file that defines an `Instrument`, and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybrid_jax.evaluate.instruments.composed_recall import ComposedRecall
from hybrid_jax.evaluate.instruments.contract import Instrument, Subject
from hybrid_jax.evaluate.instruments.cost import Cost
from hybrid_jax.evaluate.instruments.experts import ExpertLoad
from hybrid_jax.evaluate.instruments.heads import Heads
from hybrid_jax.evaluate.instruments.mixing import Mixing
from hybrid_jax.evaluate.instruments.prompts import Prompts
from hybrid_jax.evaluate.instruments.recall import Recall
from hybrid_jax.evaluate.instruments.speed import Speed
from hybrid_jax.evaluate.instruments.text import TextLoss

INSTRUMENTS: dict[str, type[Instrument]] = {
    "text": TextLoss,
    "recall": Recall,
    "composed_recall": ComposedRecall,
    "heads": Heads,
    "mixing": Mixing,
    "prompts": Prompts,
    "experts": ExpertLoad,
    "cost": Cost,
    "speed": Speed,
}


def name_of(instrument: Instrument) -> str:
    """Returns the name of an instrument's class in `INSTRUMENTS`."""
    return next(name for name, kind in INSTRUMENTS.items() if kind is type(instrument))


def make_instrument(name: str, values: Mapping[str, Any]) -> Instrument:
    """Returns an instrument of a config.

    Args:
      name: what the config calls it; used in messages.
      values: `instrument`, a name of `INSTRUMENTS`, and options.

    Raises:
      ValueError: an unknown instrument or option, or an option out of range.
    """
    options = dict(values)
    kind = options.pop("instrument", None)
    if kind not in INSTRUMENTS:
        raise ValueError(f"instruments.{name}.instrument: expected one of {', '.join(INSTRUMENTS)}, got {kind!r}")
    known = [f.name for f in dataclasses.fields(INSTRUMENTS[kind])]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"instruments.{name}: {kind} has no option {unknown[0]!r}; known: {', '.join(known)}")
    try:
        return INSTRUMENTS[kind](**options)
    except (TypeError, ValueError) as e:
        raise ValueError(f"instruments.{name}: {e}") from None


__all__ = ["INSTRUMENTS", "Instrument", "Subject", "make_instrument", "name_of"]
