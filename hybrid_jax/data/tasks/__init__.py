"""Synthetic tasks by name. A task is one file that defines a `Task`, and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hybrid_jax.data.tasks.contract import Material, Task
from hybrid_jax.data.tasks.induction import Induction
from hybrid_jax.data.tasks.needles import Needles
from hybrid_jax.data.tasks.retrieval import KeyValueRetrieval

TASKS: dict[str, type[Task]] = {
    "retrieval": KeyValueRetrieval,
    "induction": Induction,
    "needles": Needles,
}

COMMON = tuple(f.name for f in dataclasses.fields(Task))


def options_of(task: str) -> dict[str, Any]:
    """Returns the options of a task with their defaults.

    Raises:
      ValueError: no task has that name.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return {f.name: f.default for f in dataclasses.fields(TASKS[task]) if f.name not in COMMON}


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
      options: of the task, see its class.
      material, length, common: see `Task`.

    Raises:
      ValueError: an unknown task or option, or an option out of range.
    """
    check_options(task, options)
    return TASKS[task](material, length, **options, **common)


__all__ = ["TASKS", "Induction", "KeyValueRetrieval", "Material", "Needles", "Task", "check_options", "make_task", "options_of"]
