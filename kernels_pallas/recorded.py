"""Records what a benchmark prints, with the versions and the machine that it ran on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import io
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "grain", "numpy", "torch", "transformers", "triton", "flash-linear-attention")


def machine() -> str:
    """Returns the processor's name and the number of cores that this process may use, and the accelerator if JAX has one."""
    import jax

    name, listing = platform.processor(), pathlib.Path("/proc/cpuinfo")
    if listing.exists() and (match := re.search(r"^model name\s*: (.*)$", listing.read_text(), re.MULTILINE)):
        name = match[1]
    cores = f"{len(os.sched_getaffinity(0))} cores of {name or platform.machine()}"
    if jax.default_backend() == "cpu":
        return cores
    return f"{jax.device_count()} {jax.devices()[0].device_kind}, {cores}"


def versions() -> str:
    """Returns the versions of Python and of the libraries of `LIBRARIES` that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


class _Tee(io.TextIOBase):
    """Writes to several streams."""

    def __init__(self, *streams: TextIO):
        self.streams = streams

    def write(self, text: str, /) -> int:
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


@contextlib.contextmanager
def recorded(out: str | None, program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Copies what is printed inside the block to a file, after lines that say the command, the versions and the machine.

    The file is written beside its place and renamed at the end of the block; if the block fails, nothing is left.

    Args:
      out: the file; None: nothing is recorded.
      program: e.g. `kernels_pallas.bench`.
      arguments: of the command line, without `--out FILE`.
    """
    if out is None:
        yield
        return
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w") as file, contextlib.redirect_stdout(_Tee(sys.stdout, file)):
            command = shlex.join(["python", "-m", program, *arguments])
            file.write(f"# {command}\n# {datetime.date.today()}; {versions()}\n# {machine()}\n")
            yield
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def without_out(arguments: Sequence[str], *options: str) -> list[str]:
    """Returns the arguments of a command line without the options that name files, `--out FILE` by default."""
    options = options or ("--out",)
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(tuple(f"{option}=" for option in options)):
            skip = False
        elif argument in options:
            skip = True
        else:
            kept.append(argument)
    return kept
