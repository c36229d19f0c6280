"""What a teacher thinks of every token of a phase: its likeliest tokens, kept step by step.

DIR/cache.json          of which rows, and how many tokens
DIR/step-0000000/       ids.npy and log_probabilities.npy, [rows, length, k]
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hybrid_jax.files import new_directory, write_text

RECORD = "cache.json"


class TeacherCache:
    """A cache of the rows that these arguments of `training_batches` make.

    Raises:
      ValueError: the directory holds a cache of other rows; names the difference. FileNotFoundError: it holds none.
    """

    def __init__(self, path: str | pathlib.Path, k: int | None = None, *, mix: Mapping[str, float], **rows):
        self.path = pathlib.Path(path)
        shares = {name: share for name, share in sorted(mix.items()) if share}
        wanted = json.loads(json.dumps({**rows, "mix": shares}))
        record = self.path / RECORD
        if k is not None and not record.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps({**wanted, "k": k}, indent=1) + "\n")
        if not record.exists():
            raise FileNotFoundError(f"{path} holds no teacher's answers; make them with hybrid-jax cache-teacher")
        found = json.loads(record.read_text())
        self.k = found.pop("k")
        differs = [n for n in wanted if wanted[n] != found[n]] if k in (None, self.k) else ["k"]
        if differs:
            n = differs[0]
            raise ValueError(f"{path} was made with {n} = {found.get(n, self.k)}, this phase has {wanted.get(n, k)}")

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
