"""Checkpoints in the working directory: written, read back, equal."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.check.finding import Finding
from hybrid_jax.check.steps import trained
from hybrid_jax.train.checkpoint import Checkpoints

SIZE = 1 << 26  # bytes of the array that is timed


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields whether a training state comes back as it was saved, and how fast the directory is."""
    state, _ = trained("float32")
    timed = jax.random.normal(jax.random.key(0), (SIZE // 4,), jnp.float32)
    state = state._replace(trainable={**state.trainable, "timed": timed})
    begin = time.perf_counter()
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(1, state, {"rows": 3})
    written = time.perf_counter() - begin
    begin = time.perf_counter()
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        found = checkpoints.restore_latest(state)
    seconds = time.perf_counter() - begin
    same = found is not None and found[0] == 1 and found[2] == {"rows": 3}
    pairs = zip(jax.tree.leaves(found[1] if found else ()), jax.tree.leaves(state), strict=bool(found))
    same = same and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    yield Finding("a training state", "comes back as it was saved", same, f"step {found[0] if found else 'none'}")
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    yield Finding("checkpoints", "are written and read at", None, f"{size / written:.2f} and {size / seconds:.2f} GB/s")
