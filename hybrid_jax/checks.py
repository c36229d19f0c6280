"""Checks of values where they enter: a command line, a config, a config.json or another file.

Each function returns the value, or raises a ValueError that says what was expected and what came. `name` is what the
user would look for: the option, or the key with its path (`phase.learning_rate`, `gka_config.num_iter`).
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any


def _bounds(minimum, maximum, above, below) -> str:
    """The range in words, for a message."""
    parts = [
        f"{text} {bound}"
        for text, bound in (("at least", minimum), ("above", above), ("at most", maximum), ("below", below))
        if bound is not None
    ]
    return " " + " and ".join(parts) if parts else ""


def _inside(value, minimum, maximum, above, below) -> bool:
    return (
        (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def check_integer(name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """An integer between two inclusive bounds.

    Raises:
      ValueError: `value` is not an integer (True and 1.0 are not), or outside the bounds.
    """
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not fits or not _inside(value, minimum, maximum, None, None):
        raise ValueError(f"{name} must be an integer{_bounds(minimum, maximum, None, None)}, got {value!r}")
    return int(value)


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number; `minimum` and `maximum` are inclusive, `above` and `below` exclusive.

    Raises:
      ValueError: `value` is not a number (True is not), not finite, or outside the bounds.
    """
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not _inside(value, minimum, maximum, above, below):
        raise ValueError(f"{name} must be a number{_bounds(minimum, maximum, above, below)}, got {value!r}")
    return float(value)


def check_boolean(name: str, value: Any) -> bool:
    """True or False.

    Raises:
      ValueError: `value` is anything else, the string "false" and the number 0 included.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of a few names.

    Raises:
      ValueError: `value` is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")
    return value


def check_known(where: str, names: Iterable[str], known: Collection[str]) -> None:
    """All keys of a group (`where`) are known ones.

    Raises:
      ValueError: one is not; names it, the nearest known one, and all of them.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}{hint}; known: {', '.join(sorted(known)) or 'none'}")
