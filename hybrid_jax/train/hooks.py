"""The hooks that a config names: `phase.hooks` maps a name to a class and its arguments.

    "hooks": {"norms": {"hook": "my_package.norms:NormOfTheHead", "every": 100}}

The module must be importable: installed, or in a directory of PYTHONPATH. A config file can only name it; it is imported when
the phase is checked, before any work.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybrid_jax.checks import check_integer, check_known
from hybrid_jax.train.hook import EVAL, EVALUATION, Hook

CLASS, EVERY = "hook", "every"  # the fields of each hook in a config; the others are its options


def make_hooks(hooks: Mapping[str, Mapping[str, Any]]) -> list[Hook]:
    """Returns new hooks, in the order of the config.

    Args:
      hooks: name -> `hook` ("MODULE:CLASS", a subclass of `Hook`), `every` (steps between two calls, at least 1) and the class's
        options. The hook's state is stored in checkpoints by this name.

    Raises:
      ValueError: a field is missing or unknown, the class cannot be imported or is not a hook, or it refuses an option.
    """
    if not isinstance(hooks, Mapping | ConfigDict):
        raise ValueError(f"phase.hooks must map names to hooks, got {hooks!r}")
    return [_make_hook(name, values) for name, values in hooks.items()]


def option_defaults(path: Any) -> dict[str, Any]:
    """Returns the options of a hook's class, with their defaults (None for an option without one).

    Args:
      path: "MODULE:CLASS". One that names no hook has no options: the phase refuses it.
    """
    try:
        cls = _find_class("", path)
    except ValueError:
        return {}
    return {n: None if p.default is p.empty else p.default for n, p in _options(cls).items()}


def _make_hook(name: str, values: Any) -> Hook:
    where = f"phase.hooks.{name}"
    if name in (EVALUATION, EVAL):
        raise ValueError(f"{where}: this name is that of the evaluation by phase.eval_every; choose another one")
    if not isinstance(values, Mapping | ConfigDict) or CLASS not in values or EVERY not in values:
        raise ValueError(f"{where} needs {CLASS!r} ('MODULE:CLASS') and {EVERY!r} (steps between two calls), got {values!r}")
    cls, every = _find_class(where, values[CLASS]), check_integer(f"{where}.{EVERY}", values[EVERY], minimum=1)
    known = _options(cls)
    check_known(where, values, (CLASS, EVERY, *known))
    options = {n: values[n] for n in known if n in values}
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        raise ValueError(f"{where} needs the option {missing[0]!r} of {values[CLASS]}")
    try:
        hook = cls(every, **options)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from None
    hook.name = name
    return hook


def _find_class(where: str, path: Any) -> type[Hook]:
    """Imports the class that "MODULE:CLASS" names."""
    module, _, name = str(path).partition(":")
    if not (isinstance(path, str) and module and name):
        raise ValueError(f"{where}.{CLASS} must be 'MODULE:CLASS', got {path!r}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except Exception as e:  # anything may go wrong in a module of the user's
        raise ValueError(
            f"{where}.{CLASS}: cannot import {path} ({type(e).__name__}: {e}); its package must be installed or on PYTHONPATH"
        ) from e
    if not (isinstance(cls, type) and issubclass(cls, Hook)):
        raise ValueError(f"{where}.{CLASS}: {path} is not a subclass of hybrid_jax.train.hook.Hook")
    return cls


def _options(cls: type[Hook]) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a hook's constructor."""
    return {n: p for n, p in inspect.signature(cls).parameters.items() if p.kind == p.KEYWORD_ONLY}
