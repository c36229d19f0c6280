"""Reading a config: a Python file with `get_config()`, and `--config.a.b=value` for its fields."""

from __future__ import annotations

import ast
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from hybrid_jax.checks import check_known
from hybrid_jax.files import find_shipped, shipped_root

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
EXAMPLES = {tuple: "('a', 'b')", list: "['a', 'b']"}


def load_config(arguments: list[str], fields: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None) -> ConfigDict:
    """Reads `--config=FILE[:ARGUMENT]` and overrides of its fields, `--config.a.b=value`.

    A relative FILE that is not there is looked for among the configs that come with the package.

    Args:
      fields: config -> every field that it may have, nested, each with a value of its type; None: those that it has.

    Raises:
      ValueError: no such file, an error in it, no such field, or a value of another type.
    """
    file, _, argument = next(a.removeprefix("--config=") for a in arguments if a.startswith("--config=")).partition(":")
    config = _get_config(find_shipped(file), [argument] if argument else [])
    overrides = [a.removeprefix("--config.").partition("=") for a in arguments if a.startswith("--config.")]
    for name, equals, text in overrides:
        if not equals:
            raise ValueError(f"--config.{name} needs a value: --config.{name}=VALUE")
        _override(config, name.split("."), text, {} if fields is None else fields(config.to_dict()))
    return config


def _get_config(path: pathlib.Path, arguments: list[str]) -> ConfigDict:
    if not path.is_file():
        there = ", ".join(sorted(f"configs/{p.name}" for p in (shipped_root() / "configs").glob("*.py")))
        raise ValueError(f"no config file at {str(path)!r}; hybrid_jax comes with {there}")
    module = types.ModuleType("hybrid_jax_config")
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses, for one, look their module up
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        config = module.get_config(*arguments)
    except Exception as e:  # anything may go wrong in a program of the user's
        raise ValueError(f"{path}: {e}" if isinstance(e, ValueError) else f"{path}: {type(e).__name__}: {e}") from e
    finally:
        del sys.modules[module.__name__]
        if before is not None:  # a config that reads another one
            sys.modules[module.__name__] = before
    if not isinstance(config, Mapping | ConfigDict):
        raise ValueError(f"{path}: get_config() must return a ConfigDict, got {type(config).__name__}")
    return ConfigDict(config.to_dict() if isinstance(config, ConfigDict) else dict(config))


def _override(config: ConfigDict, path: list[str], text: str, fields: Mapping[str, Any]) -> None:
    """Sets one field from the text of an option.

    Args:
      fields: the fields that `config` may have, with values of their types; beside those that it has.
    """
    where = "config"
    for depth, key in enumerate(path):
        check_known(where, [key], {*config, *fields})
        where, default = f"{where}.{key}", fields.get(key)
        if depth == len(path) - 1:
            break
        if config.get(key) is None and isinstance(default, Mapping):
            with config.unlocked():
                config[key] = {}
        inner = config.get(key)
        if not isinstance(inner, ConfigDict):
            raise ValueError(f"{where} is one value, it has no field {path[depth + 1]!r}")
        config, fields = inner, default if isinstance(default, Mapping) else {}
    value = config.get(path[-1])
    if isinstance(value if value is not None else default, Mapping | ConfigDict):
        raise ValueError(f"{where} is a group; set its fields, --{where}.NAME=VALUE")
    with config.unlocked(), config.ignore_type():
        config[path[-1]] = parse_value(where, text, default if value is None or isinstance(default, float) else value)


def parse_value(where: str, text: str, like: Any) -> Any:
    """The text of an option as a value of the type of `like`.

    Raises:
      ValueError: it is none.
    """
    kind = type(like)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{where} must be true or false, got {text!r}")
        return BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{where} must be {'an integer' if kind is int else 'a number'}, got {text!r}") from None
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if kind in (tuple, list):
        if isinstance(value, str) and value == text and not text.isidentifier():
            raise ValueError(f'{where} must be a Python {kind.__name__}, e.g. "{EXAMPLES[kind]}", got {text!r}')
        return kind(value if isinstance(value, tuple | list) else (value,))
    return value


def flat(values: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": x} of {a: {b: x}}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping | ConfigDict) else {prefix + key: value}
    return found
