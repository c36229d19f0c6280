"""Applies the mutations one by one to a copy of the project and prints which test notices each; see the package."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from tests.mutations import ROOT, Mutation, catalogue

COPIED = ("hybrid_jax", "kernels_pallas", "configs", "launch", "tests", "pyproject.toml", "requirements.txt", "README.md")
SECONDS = 600  # for the tests of one mutation; one that makes them hang is noticed


class Outcome(NamedTuple):
    mutation: Mutation
    noticed_by: str  # the first test that fails; empty: none did
    error: str = ""  # the tests did not run


def outcome_of(mutation: Mutation, cache: pathlib.Path) -> Outcome:
    """Runs the mutation's tests on a mutated copy of the project."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        root = pathlib.Path(directory)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
            elif source.exists():
                shutil.copyfile(source, root / name)
        mutation.apply(root)
        environment = {**os.environ, "PYTHONPATH": str(root), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *mutation.tests]
        try:
            result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(mutation, f"no end after {SECONDS} s")
    if result.returncode == 0:
        return Outcome(mutation, "")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if failed is None:
        last = (result.stdout.strip() or result.stderr.strip() or "no output").splitlines()[-1]
        return Outcome(mutation, "", f"pytest ended with {result.returncode}: {last}")
    return Outcome(mutation, failed[1])


def outcomes(mutations: Sequence[Mutation], processes: int) -> list[Outcome]:
    """All outcomes, each printed when it is known."""
    found = []
    with tempfile.TemporaryDirectory(prefix="mutants-cache-") as cache, concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for n, outcome in enumerate(pool.map(lambda m: outcome_of(m, pathlib.Path(cache)), mutations), start=1):
            result = outcome.error or outcome.noticed_by or "SURVIVED"
            print(f"{n:4} {outcome.mutation.file}: {outcome.mutation.why}\n     {result}", flush=True)
            found.append(outcome)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every mutation was noticed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations whose file or description contains one of these")
    parser.add_argument("--processes", type=int, default=2, help="mutations tried at the same time (default 2)")
    options = parser.parse_args(arguments)
    chosen = [m for m in catalogue() if not options.words or any(w in m.file or w in m.why for w in options.words)]
    found = outcomes(chosen, options.processes)
    noticed = sum(bool(o.noticed_by) for o in found)
    print(f"{noticed} of {len(found)} mutations were noticed")
    return int(noticed < len(found))


if __name__ == "__main__":
    sys.exit(main())
