"""Options that check themselves: the base of every options class and of a mixer's, and the checks that their fields declare.

A check takes (name, value) and returns the value, or raises a ValueError that names the key, what was expected and what
came. This module imports no array library, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
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


class MixerOptions(Options):
    """Base class of the options of one mixer kind: what `KEY` (`gka_config`, ...) may hold in config.json."""

    # Keys that repeat the model's sizes: written on export, rejected where they contradict the model.
    REPEATED: ClassVar[frozenset[str]] = frozenset()
    # Keys that hybrid-model-factory knows and that may have only this value here.
    FIXED: ClassVar[Mapping[str, Any]] = {}
    # Keys that change how a kernel of hybrid-model-factory computes, but not the result: any valid value, kept for the export.
    FREE: ClassVar[Mapping[str, Check]] = {}
    # Keys for which the vLLM plugin has other defaults elsewhere: always written on export, so that no default decides.
    STATED: ClassVar[Mapping[str, Any]] = {}
    # Options that are written only where they differ from the default.
    ONLY_IF_CHANGED: ClassVar[frozenset[str]] = frozenset()
    # Options that mean nothing, and are written as false, where the source model does not norm queries and keys.
    ONLY_WITH_QK_NORM: ClassVar[frozenset[str]] = frozenset()
    # Options that must divide the number of query heads, or be null.
    DIVIDE_HEADS: ClassVar[frozenset[str]] = frozenset()

    @property
    def inner(self) -> tuple[str, ...]:
        """The kinds of the mixers inside this mixer, whose options count too."""
        return ()

    @property
    def window(self) -> int | None:
        """How many keys a query sees at most; None for a mixer that does not attend to keys."""
        return None

    @property
    def own_heads(self) -> int | None:
        """How many heads the mixer has where they are not attention's; None: they are."""
        return None

    def sharded_widths(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Mapping[str, int]:
        """Returns the sizes, by parameter, that `tensor` must divide and does not because it divides the numbers of heads."""
        return {}

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Checks that the mixer can be in a model whose attention has these numbers of heads.

        Raises:
          ValueError: one of `DIVIDE_HEADS` does not divide the query heads, or an option has nothing to act on there.
        """
        for name in sorted(self.DIVIDE_HEADS):
            value = getattr(self, name)
            if value is not None and num_heads % value:
                raise ValueError(f"{self.KEY}.{name} must divide num_attention_heads ({num_heads}), got {value}")
