"""Silences what libraries print that the user of a command can do nothing about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Read by the libraries when they are loaded; what the user has set stays.
ENVIRONMENT = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that torch is not installed; only its tokenizers are used
    "TPU_STDERR_LOG_LEVEL": "3",  # libtpu's traces of the places in a source that a compiler's error comes from
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def silence_libraries() -> None:
    """Turns off warnings of absl (orbax) and notices of transformers and libtpu. Call it before the libraries are imported.

    Errors are raised or printed as before.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from absl import logging

    logging.set_verbosity(logging.ERROR)


@contextlib.contextmanager
def native_stderr_hidden() -> Iterator[None]:
    """Drops what native libraries write to stderr within the block; Python's exceptions are raised as usual."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
