"""The contract of a suite of prompts: what it reads from files, and how it scores what a model writes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt.

    Args:
      prompt: the text that asks.
      references: right answers, as the suite's scorer takes them.
      at: what kind of example it is, e.g. {"task": "niah_single_1"}; results are also given by it.
      record: the record it was made from.
      begin: how the answer begins, which the model continues; with the white space that divides it from the prompt.
      messages: the prompt as a conversation, {role, content} each; empty: the prompt is one message of a user.
    """

    prompt: str
    references: tuple[str, ...]
    at: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    begin: str = ""
    messages: tuple[Mapping[str, str], ...] = ()

    @property
    def plain(self) -> str:
        """The text that a model without chat template continues."""
        return self.prompt + self.begin

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages that a chat template renders; `begin`, without white space before it, follows what it renders."""
        return [dict(m) for m in self.messages] or [{"role": "user", "content": self.prompt}]


@dataclasses.dataclass(frozen=True)
class Suite:
    """How a suite's files are read and its continuations scored.

    Args:
      read: (record of a file, its path) -> the example, or a KeyError that names a field which the record lacks.
      score: (continuation, example) -> from 0 to 1.
      new_tokens: how many tokens are generated, unless the evaluation says otherwise.
      files: which files of a folder are read, as a pattern.
    """

    read: Callable[[Mapping[str, Any], pathlib.Path], Example]
    score: Callable[[str, Example], float]
    new_tokens: int
    files: str = "**/*.jsonl"


def records(path: pathlib.Path, pattern: str) -> Iterator[tuple[Mapping[str, Any], pathlib.Path, int]]:
    """Yields (record, file, line from 1) of a JSON Lines or Parquet file, or of those in a folder, in the order of their names.

    Raises:
      FileNotFoundError: there is nothing at the path, or no such file in the folder.
      ValueError: a line is not a JSON object.
    """
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise FileNotFoundError(f"no file {pattern} at {path}" if path.exists() else f"there is no file or folder {path}")
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet as parquet  # of the extra `data`

            yield from ((row, file, n) for n, row in enumerate(parquet.read_table(file).to_pylist(), start=1))
            continue
        for n, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as e:
                raise ValueError(f"{file}, line {n}: not JSON ({e})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}, line {n}: expected a JSON object, got {type(record).__name__}")
            yield record, file, n


def read_examples(suite: Suite, path: str, limit: int = 0) -> list[Example]:
    """Returns the examples of a file or a folder.

    Args:
      limit: of every file only so many; 0: all.

    Raises:
      FileNotFoundError, ValueError: nothing is there, or a record is not of this suite; names file, line and field.
    """
    found = []
    taken: dict[pathlib.Path, int] = {}
    for record, file, line in records(pathlib.Path(path), suite.files):
        if limit and taken.get(file, 0) == limit:
            continue
        taken[file] = taken.get(file, 0) + 1
        try:
            found.append(suite.read(record, file))
        except KeyError as e:
            raise ValueError(f"{file}, line {line}: the record has no field {e}; it has {', '.join(record)}") from None
        except (TypeError, ValueError) as e:
            raise ValueError(f"{file}, line {line}: {e}") from None
    if not found:
        raise ValueError(f"{path} holds no examples")
    return found
