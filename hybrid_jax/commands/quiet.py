"""Silences what libraries print that the user of a command can do nothing about."""

from __future__ import annotations

import os

# Read by the libraries when they are loaded; what the user has set stays.
ENVIRONMENT = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that torch is not installed; only its tokenizers are used
    "TPU_STDERR_LOG_LEVEL": "3",  # libtpu's traces of the places in a source that a compiler's error comes from
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def silence_libraries():
    """Before the libraries are imported: warnings of absl (orbax) and notices of transformers and libtpu are not printed.

    Errors are raised or printed as before.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from absl import logging

    logging.set_verbosity(logging.ERROR)
