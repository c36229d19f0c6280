"""A teacher's top-k tokens and their log-probabilities for every token of a phase, stored step by step.

DIR/cache.json          which rows (text, packing, tokenizer, mix, seed), which teacher, and how many tokens
DIR/step-0000000/       ids.npy and log_probabilities.npy, [rows, length, k]
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_jax.files import new_directory, write_text

RECORD = "cache.json"
TEACHER_FILES = "teacher_files"  # in the record: which files are the teacher that the phase names
DEFAULT_K = 64  # tokens kept of every distribution, where nothing else is said


def shortened(value: Any) -> str:
    """Formats a value for a message; a hash is shortened to its beginning."""
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)


def tokens_kept(path: str | pathlib.Path) -> int:
    """Returns how many tokens of every distribution a cache keeps; `DEFAULT_K` where there is none yet."""
    record = pathlib.Path(path) / RECORD
    return json.loads(record.read_text())["k"] if record.exists() else DEFAULT_K


class TeacherCache:
    """A directory of a teacher's top-k tokens for the rows that `training_batches` makes with the same arguments.

    Args:
      path: the directory.
      k: tokens kept of every distribution, to write a cache or continue one; None: to read.
      mix, rows: arguments of `training_batches` that decide which rows come in which order.
      made_of: what else decides the teacher's answers: the rows' text, packing and tokenizer (`Corpus.identity`), and
        `teacher` if one is loaded, `teacher_files` if the phase names one (`train.teacher`). Entries that are not given are not
        compared.

    Attributes:
      names_teacher: whether the phase for which it was made named its teacher.

    Raises:
      ValueError: the directory holds a cache of other rows or of another teacher; names the first difference.
      FileNotFoundError: it holds none.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        k: int | None = None,
        *,
        mix: Mapping[str, float],
        made_of: Mapping[str, Any] | None = None,
        **rows: Any,
    ):
        self.path = pathlib.Path(path)
        shares = {name: share for name, share in sorted(mix.items()) if share}
        wanted = json.loads(json.dumps({**rows, "mix": shares, **(made_of or {})}))
        record = self.path / RECORD
        if k is not None and not record.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps({**wanted, "k": k}, indent=1) + "\n")
        if not record.exists():
            raise FileNotFoundError(f"{path} holds no teacher's answers; make them with hybrid-jax cache-teacher")
        found = json.loads(record.read_text())
        self.k, self.names_teacher = found["k"], TEACHER_FILES in found
        for name, value in {**wanted, "k": self.k if k is None else k}.items():
            if name not in found:
                raise ValueError(f"{path} does not say with which {name} it was made; remove it and make it again")
            if found[name] != value:
                who = {"teacher": "this teacher is", TEACHER_FILES: "this phase's teacher has"}.get(name, "this phase has")
                raise ValueError(
                    f"{path} was made with {name} = {shortened(found[name])}, {who} {shortened(value)}; make another with "
                    "hybrid-jax cache-teacher, in another directory"
                )

    def _step(self, step: int) -> pathlib.Path:
        return self.path / f"step-{step:07d}"

    def missing(self, steps: int) -> Iterator[int]:
        """Returns the steps below `steps` that have not been written yet."""
        return (step for step in range(steps) if not self._step(step).exists())

    def check(self, steps: int) -> None:
        """Checks that the cache holds all steps below `steps`.

        Raises:
          FileNotFoundError: a step is missing; the message names the first.
        """
        if (step := next(self.missing(steps), None)) is not None:
            raise FileNotFoundError(
                f"{self.path} has no step {step} of {steps}: the teacher's answers end before the phase does; "
                "hybrid-jax cache-teacher goes on where it stopped"
            )

    def write(self, step: int, ids: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Writes a step: `ids` and `log_probabilities` [rows, length, k], stored as uint32 and float16."""
        with new_directory(self._step(step)) as directory:
            np.save(directory / "ids.npy", ids.astype(np.uint32))
            np.save(directory / "log_probabilities.npy", log_probabilities.astype(np.float16))

    def read(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads some rows of a step.

        Returns:
          `teacher_ids` int32 and `teacher_log_probabilities` float32, each [rows, length, k].
        """
        directory = self._step(step)
        ids, values = (np.load(directory / f"{n}.npy", mmap_mode="r")[list(rows)] for n in ("ids", "log_probabilities"))
        return {"teacher_ids": ids.astype(np.int32), "teacher_log_probabilities": values.astype(np.float32)}
