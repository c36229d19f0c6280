"""Options that check themselves: the base of every options class, and the checks that their fields declare.

A check takes (name, value) and returns the value, or raises a ValueError that names the key, what was expected and what
came. This module imports no array library, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

from hybrid_jax.checks import check_choice, check_integer, check_number

Check = Callable[[str, Any], Any]
LARGEST = 2**31 - 1  # positions, token ids and sizes are 32-bit integers


def integer(minimum: int = 1, maximum: int = LARGEST) -> Check:
    """Returns a check for an integer between two inclusive bounds."""
    return functools.partial(check_integer, minimum=minimum, maximum=maximum)


def number(
    *, minimum: float | None = None, maximum: float | None = None, above: float | None = None, below: float | None = None
) -> Check:
    """Returns a check for a finite number; `minimum` and `maximum` are inclusive, `above` and `below` exclusive."""
    return functools.partial(check_number, minimum=minimum, maximum=maximum, above=above, below=below)


def choice(*names: str) -> Check:
    """Returns a check for one of a few names."""
    return functools.partial(check_choice, choices=names)


def optional(check: Check) -> Check:
    """Returns a check for null or what `check` accepts."""
    return lambda name, value: None if value is None else check(name, value)


EPSILON = number(above=0, below=1)


def option(check: Check, default: Any = dataclasses.MISSING) -> Any:
    """Declares a field of an options class: the check of its values and its default; without a default it must be given."""
    return dataclasses.field(default=default, metadata={"check": check})


class Options:
    """Base class of frozen dataclasses whose fields are all declared with `option`.

    An instance checks itself when it is made. `KEY` is the name that error messages give the group of options; for a
    mixer it is the key of config.json.
    """

    KEY: ClassVar[str]

    def __post_init__(self):
        for name, check in self.checks().items():
            check(f"{self.KEY}.{name}", getattr(self, name))

    @classmethod
    def checks(cls) -> dict[str, Check]:
        """Returns the check of every option, by name."""
        return {field.name: field.metadata["check"] for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
