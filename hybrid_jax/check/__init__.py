"""The first hour on a machine: is everything right here, how fast is it, and what was predicted (`hybrid-jax check`).

`PARTS` has the parts of a check; each yields a `Finding` after the other. `check_page` makes one page of them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence

from hybrid_jax.check import collectives, kernels, machine, meshes, steps, storage
from hybrid_jax.check.finding import Finding

PARTS: dict[str, Callable[[pathlib.Path], Iterator[Finding]]] = {
    "machine": machine.check,
    "kernels": kernels.check,
    "collectives": collectives.check,
    "meshes": meshes.check,
    "steps": steps.check,
    "storage": storage.check,
}


def run_checks(parts: Sequence[str], workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields what the parts find. A part that raises ends with a finding that failed, and the next one begins.

    Args:
      parts: names in `PARTS`.
      workdir: a directory of this check's own, in which files are written; of several processes all must see it.
    """
    for part in parts:
        try:
            for finding in PARTS[part](workdir):
                yield finding._replace(part=part)
        except Exception as error:  # whatever a driver or a compiler raises: the page is for finding out
            message = " ".join(str(error).split())[:500]
            yield Finding("", "ends without an error", False, f"{type(error).__name__}: {message}", part)


__all__ = ["PARTS", "Finding", "run_checks"]
