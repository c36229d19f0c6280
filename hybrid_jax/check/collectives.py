"""The collectives that training uses, over all devices: right, and how fast."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.check.finding import Finding
from hybrid_jax.check.measuring import seconds_of


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields whether each collective is right, and the bytes that a device sends per second."""
    del workdir
    n = jax.device_count()
    if n == 1:
        yield Finding("collectives", "are not there", None, "one device")
        return
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    floats = (1 << 18) if jax.default_backend() == "cpu" else (1 << 24)  # of a device: 1 or 64 MiB
    onward = [(i, (i + 1) % n) for i in range(n)]
    size = floats // n * n

    def values(i: int) -> np.ndarray:
        """Returns the part of device i: small integers, no two parts alike."""
        return ((np.arange(size) * 7 + i * 13) % 251).astype(np.float32)

    # name -> (function of a device's part [size], what device i then has, share of the part that it sends)
    cases: dict[str, tuple[Callable, Callable, float]] = {
        "all-reduce": (lambda x: jax.lax.psum(x, "all"), lambda i: sum(values(j) for j in range(n)), 2 * (n - 1) / n),
        "all-gather": (
            lambda x: jax.lax.all_gather(x[: x.size // n], "all", tiled=True),
            lambda i: np.concatenate([values(j)[: size // n] for j in range(n)]),
            (n - 1) / n,
        ),
        "permute": (lambda x: jax.lax.ppermute(x, "all", onward), lambda i: values((i - 1) % n), 1),
        "all-to-all": (
            lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True),
            lambda i: np.concatenate([values(j).reshape(n, -1)[i] for j in range(n)]),
            (n - 1) / n,
        ),
    }

    def part(index: Any) -> np.ndarray:
        return values((index[0].start or 0) // size)

    parts = jax.make_array_from_callback((n * size,), NamedSharding(mesh, P("all")), part)
    for name, (function, expected, share) in cases.items():
        call = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False))
        shards: Any = call(parts).addressable_shards
        found = {(s.index[0].start or 0) // size: np.asarray(s.data) for s in shards}
        right = all(np.array_equal(value, expected(i)) for i, value in found.items())
        yield Finding(name, "is right", right, f"over {n} devices")
        seconds = seconds_of(functools.partial(call, parts))
        yield Finding(name, "sends", None, f"{share * size * 4 / seconds / 1e9:.2f} GB/s per device ({size * 4 / 2**20:.0f} MiB)")
