"""Semantic mutations: small wrong changes of the code, each with the tests that must notice it.

    python -m tests.mutations                     # all of them, two at a time
    python -m tests.mutations train.py parallel   # those whose file or description has one of these words

A mutation that no test notices ("survived") shows a thin place in the tests. `./launch/test.sh -m long tests/mutations` runs all
and requires that at least 95 % are noticed; `test_catalogue.py` checks in every run that each still applies to the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One wrong change.

    Args:
      file: path from the project's root.
      old: text that occurs exactly once in the file.
      new: what replaces it.
      why: what the change breaks, in a few words.
      tests: pytest arguments (files, or `file::name`) of which at least one must fail; the cheapest that notices it.
    """

    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]

    def apply(self, root: pathlib.Path):
        """Changes the file under `root`.

        Raises:
          ValueError: `old` does not occur exactly once: the code has changed, and so must the mutation.
        """
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} occurs {text.count(self.old)} times, not once ({self.why})")
        path.write_text(text.replace(self.old, self.new))


def catalogue() -> list[Mutation]:
    """Every mutation of the modules `tests/mutations/of_*.py`, each of which has a list `MUTATIONS`."""
    names = sorted(m.name for m in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)]) if m.name.startswith("of_"))
    return [m for name in names for m in importlib.import_module(f"tests.mutations.{name}").MUTATIONS]
