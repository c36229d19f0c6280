"""The chips that the laboratory compiles for."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """topology: the smallest one of libtpu; cores: of a device; clock: in Hz, from the published bf16 peak."""

    topology: str
    cores: int
    clock: float
    bandwidth: float  # of the HBM of a device, in bytes per second


CHIPS = {
    "v5e": Chip("v5e:2x2", 1, 1.50e9, 0.82e12),
    "v5p": Chip("v5p:2x2x1", 2, 1.75e9, 2.46e12),
    "v6e": Chip("v6e:2x2", 1, 1.75e9, 1.64e12),
    "tpu7x": Chip("tpu7x:2x2x1", 1, 2.20e9, 3.70e12),
}
