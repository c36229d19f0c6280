"""Errors and times, as every part of a check measures them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def largest_error(got: Any, want: Any) -> float:
    """Returns the largest |got - want| / |want| (norms) of two trees' arrays; infinite where a number of either is not finite, or
    where the shapes differ."""
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        comparable = a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all()
        errors.append(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) if comparable else np.inf)
    return max(errors)


def seconds_of(call: Callable[[], Any], times: int = 10) -> float:
    """Returns the median of the seconds that a call takes until its arrays are there, after one that is not timed."""
    jax.block_until_ready(call())
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
