"""The fields that an experiment's config may have: for overrides of fields that it does not name, and to say what is misspelt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config
from hybrid_jax.data.corpus import Source
from hybrid_jax.data.tasks import TASKS, task_fields
from hybrid_jax.mixers import options_by_key
from hybrid_jax.parallel.mesh import AXES
from hybrid_jax.selection.select import select_fields
from hybrid_jax.train.hooks import CLASS, EVERY, option_defaults
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.phase import Phase

_EMPTY = {"str": "", "int": 0, "float": 0.0, "bool": False}  # of a field without a default


def fields_of(config: Mapping) -> dict[str, Any]:
    """Every field that an experiment may have, nested, each with a value of its type; groups are dicts.

    Args:
      config: names the phases and the sources.
    """
    data = config.get("data") or {}
    sources = {name: _defaults(Source) for name in data.get("sources") or {}}
    tasks = task_fields(data.get("tasks") or {})
    mix, mesh = dict.fromkeys(("text", *sources, *TASKS, *tasks), 0.0), dict.fromkeys(AXES, 1)
    phases = {
        name: _defaults(Phase) | {"mix": mix, "mesh": mesh, "options": _options(phase), "hooks": _hooks(phase)}
        for name, phase in (config.get("phases") or {}).items()
    }
    return {
        "source": "",
        "model": {},
        "pattern": "",
        "fresh_parameters": "transformers",
        "copy_attention": True,
        "select": select_fields(config.get("select") or {}),
        "mixers": {key: _defaults(cls) for key, cls in options_by_key().items()},
        "schedule": (),
        "phases": phases,
        "data": {"text": "", "sources": sources, "tasks": tasks, "mix": mix},
        "seed": 0,
        "mesh": mesh,
    }


def load_experiment_config(arguments: list[str]) -> ConfigDict:
    """Reads an experiment's config with overrides, also of fields that the file does not name; see `load_config`."""
    return load_config(arguments, fields_of)


def _options(phase: Mapping) -> dict[str, Any]:
    """The options of a phase's objective; their values are read as Python's, and checked by the objective."""
    objective = OBJECTIVES.get(phase.get("objective", ""))
    return dict.fromkeys(objective.options) if objective else {}


def _hooks(phase: Mapping) -> dict[str, Any]:
    """The fields of each hook that a phase names."""
    hooks = phase.get("hooks") or {}
    return {name: {CLASS: "", EVERY: 1, **option_defaults(values.get(CLASS))} for name, values in hooks.items()}


def _defaults(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their defaults."""
    found = {}
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
        else:
            found[f.name] = _EMPTY.get(str(f.type)) if f.default is dataclasses.MISSING else f.default
    return found
