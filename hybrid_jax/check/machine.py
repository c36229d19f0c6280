"""Devices, processes and versions."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax

from hybrid_jax.check.finding import Finding
from hybrid_jax.hardware import accelerator_of
from hybrid_jax.parallel.distributed import of_every_process
from kernels_pallas.arguments import BEST, backend
from kernels_pallas.recorded import machine, versions


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields what the machine is."""
    del workdir
    yield Finding("machine", "is", None, machine())
    yield Finding("versions", "are", None, versions())
    device, local = jax.local_devices()[0], of_every_process(len(jax.local_devices()))
    yield Finding("processes", "have equally many devices", len(set(local)) == 1, f"{len(local)} of {sorted(set(local))} devices")
    kinds = {d.device_kind for d in jax.devices()}
    yield Finding("devices", "are of one kind", len(kinds) == 1, f"{jax.device_count()} {', '.join(sorted(kinds))}")
    yield Finding("kernels", "run as", None, BEST.get(backend(), "xla"))
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if memory:
        known = accelerator_of(device.device_kind)
        expected = f"; the planner counts on {known.hbm / 1e9:.1f} GB" if known else ""
        yield Finding("memory of a device", "is", None, f"{memory / 1e9:.1f} GB{expected}")
