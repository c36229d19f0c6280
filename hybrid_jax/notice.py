"""One line to the user about input that was not taken as it is."""

from __future__ import annotations

import sys

from hybrid_jax.parallel.distributed import is_first


def notice(text: str):
    """Prints one line to stderr, so that stdout keeps the results; of several processes the first prints."""
    if is_first():
        print(f"hybrid-jax: {text}", file=sys.stderr, flush=True)
