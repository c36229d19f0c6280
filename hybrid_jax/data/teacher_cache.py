"""What a teacher thinks of every token of a phase: its likeliest tokens, kept step by step.

DIR/cache.json          of which rows (text, packing, tokenizer, mix, seed), which teacher, and how many tokens
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


def shortened(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)


class TeacherCache:
    """A cache of the rows that these arguments of `training_batches` make.

    Args:
      path: its directory.
      k: tokens kept of every distribution, to make one or go on with it; None: to read.
      mix, rows: which rows, in which order.
      made_of: what else decides the answers: the rows' text, packing and tokenizer (`Corpus.identity`), and `teacher` where
        one is at hand. What is not given is not compared.

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
        **rows,
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
        self.k = found["k"]
        for name, value in {**wanted, "k": self.k if k is None else k}.items():
            if name not in found:
                raise ValueError(f"{path} does not say with which {name} it was made; remove it and make it again")
            if found[name] != value:
                who = "this teacher is" if name == "teacher" else "this phase has"
                raise ValueError(
                    f"{path} was made with {name} = {shortened(found[name])}, {who} {shortened(value)}; make another with "
                    "hybrid-jax cache-teacher, in another directory"
                )

    def _step(self, step: int) -> pathlib.Path:
        return self.path / f"step-{step:07d}"

    def missing(self, steps: int) -> Iterator[int]:
        """The steps below `steps` that are not there yet."""
        return (step for step in range(steps) if not self._step(step).exists())

    def check(self, steps: int):
        """That it holds so many steps.

        Raises:
          FileNotFoundError: it does not; names the first that is missing.
        """
        if (step := next(self.missing(steps), None)) is not None:
            raise FileNotFoundError(
                f"{self.path} has no step {step} of {steps}: the teacher's answers end before the phase does; "
                "hybrid-jax cache-teacher goes on where it stopped"
            )

    def write(self, step: int, ids: np.ndarray, log_probabilities: np.ndarray):
        with new_directory(self._step(step)) as directory:
            np.save(directory / "ids.npy", ids.astype(np.uint32))
            np.save(directory / "log_probabilities.npy", log_probabilities.astype(np.float16))

    def read(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Of some rows of a step."""
        directory = self._step(step)
        ids, values = (np.load(directory / f"{n}.npy", mmap_mode="r")[list(rows)] for n in ("ids", "log_probabilities"))
        return {"teacher_ids": ids.astype(np.int32), "teacher_log_probabilities": values.astype(np.float32)}
