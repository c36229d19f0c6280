"""Synthetic tasks by name. A task is one file that defines a `Task`, and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hybrid_jax.checks import check_integer
from hybrid_jax.data.tasks.arithmetic import Addition
from hybrid_jax.data.tasks.contract import Material, Task
from hybrid_jax.data.tasks.copying import SelectiveCopying
from hybrid_jax.data.tasks.induction import Induction
from hybrid_jax.data.tasks.letter_choice import LetterChoice
from hybrid_jax.data.tasks.mqar import MultiQueryRecall
from hybrid_jax.data.tasks.needles import Needles
from hybrid_jax.data.tasks.retrieval import KeyValueRetrieval
from hybrid_jax.data.tasks.ruler import CommonWords, FrequentWords, VariableTracking
from hybrid_jax.data.tasks.state_tracking import ModularArithmetic, Parity

TASKS: dict[str, type[Task]] = {
    "retrieval": KeyValueRetrieval,
    "induction": Induction,
    "needles": Needles,
    "mqar": MultiQueryRecall,
    "selective_copying": SelectiveCopying,
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "letter_choice": LetterChoice,
    "addition": Addition,
    "variable_tracking": VariableTracking,
    "common_words": CommonWords,
    "frequent_words": FrequentWords,
}

COMMON = tuple(f.name for f in dataclasses.fields(Task))


OF_ALL: dict[str, Any] = {"symbols": 0}
"""Options of every task. `symbols`: from how many of the tokenizer's symbols it draws; 0: all. Few are learned in few steps."""


def options_of(task: str) -> dict[str, Any]:
    """Returns the options of a task with their defaults, those of every task last.

    Raises:
      ValueError: no task has that name.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return {f.name: f.default for f in dataclasses.fields(TASKS[task]) if f.name not in COMMON} | OF_ALL


def task_fields(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the fields that each task of a config's `data.tasks` may have, with their defaults."""
    return {
        name: {"task": "", **(options_of(values["task"]) if values.get("task") in TASKS else {})} for name, values in tasks.items()
    }


def check_options(task: str, names: Iterable[str]) -> None:
    """Checks that a task has options of these names.

    Raises:
      ValueError: an unknown task, or an option that it does not have.
    """
    known = options_of(task)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"the task {task!r} has no option {unknown[0]!r}; known: {', '.join(known)}")


def make_task(task: str, options: Mapping[str, Any], material: Material, length: int, **common: Any) -> Task:
    """Returns the rows of a task.

    Args:
      task: a name of `TASKS`.
      options: of the task, see its class, and of every task, see `OF_ALL`.
      material, length, common: see `Task`.

    Raises:
      ValueError: an unknown task or option, or an option out of range.
    """
    check_options(task, options)
    own = {name: value for name, value in options.items() if name not in OF_ALL}
    if symbols := check_integer(f"{task}: symbols", options.get("symbols", 0), minimum=0):
        material.check_symbols(task, symbols)
        material = dataclasses.replace(material, symbols=(material.symbols[0], material.symbols[0] + symbols))
    return TASKS[task](material, length, **own, **common)


__all__ = [
    "TASKS",
    "Induction",
    "KeyValueRetrieval",
    "Material",
    "Needles",
    "Task",
    "check_options",
    "make_task",
    "options_of",
    "task_fields",
]
