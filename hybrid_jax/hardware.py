"""What is known of accelerators, and the shapes of TPU slices.

Peaks of bf16 matmuls, HBM and interconnect per device, from the vendors' public pages. A tpu7x chip is two devices; each
has half of it. Of TPUs the interconnect is that of all links of a chip. Of GPUs it is NVLink's one way: half of the total
that the data sheets state for both ways (A100 600, H100 and H200 900, B200 1800 GB/s). Between nodes a GPU has its share of
the adapters that NVIDIA's own systems have for eight GPUs: eight of 200 Gb/s (DGX A100) or of 400 Gb/s (DGX H100, H200 and
B200), 25 and 50 GB/s one way. A cluster with slower adapters is slower.
"""

from __future__ import annotations

from typing import NamedTuple


class Accelerator(NamedTuple):
    flops: float  # bf16, a second
    hbm: float  # bytes a program may use
    bandwidth: float  # of HBM, bytes per second
    interconnect: float  # bytes per second; of GPUs inside a node, one way
    slices: tuple[str, ...] = ()  # TPU topologies, small to large
    node: int = 0  # devices of a node; 0: every device is reached by the interconnect
    network: float = 0.0  # bytes per second of a device to other nodes, one way


def _cubes(largest: int) -> tuple[str, ...]:
    shapes = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
    return tuple("x".join(map(str, s)) for s in shapes if s[0] * s[1] * s[2] <= largest)


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

GIB = 2.0**30
TPUS: dict[str, Accelerator] = {
    "v5e": Accelerator(197e12, 15.75 * GIB, 0.819e12, 200e9, _SQUARES),
    "v5p": Accelerator(459e12, 95.74 * GIB, 2.765e12, 600e9, _cubes(512)),
    "v6e": Accelerator(918e12, 31.25 * GIB, 1.640e12, 448e9, _SQUARES),
    "tpu7x": Accelerator(1153e12, 94.75 * GIB, 3.690e12, 600e9, _cubes(512)),
}
GPUS: dict[str, Accelerator] = {
    "a100": Accelerator(312e12, 80e9, 2.039e12, 300e9, node=8, network=25e9),
    "h100": Accelerator(989e12, 80e9, 3.35e12, 450e9, node=8, network=50e9),
    "h200": Accelerator(989e12, 141e9, 4.8e12, 450e9, node=8, network=50e9),
    "b200": Accelerator(2250e12, 180e9, 8.0e12, 900e9, node=8, network=50e9),
}


def accelerator(topology: str) -> tuple[str, Accelerator, str]:
    """`v5p:4x4x4` or `h100:64` -> (chip, what it is, the part after the colon, empty if there is none).

    Raises:
      ValueError: an unknown chip, or a TPU slice it does not come in.
    """
    chip, _, shape = topology.partition(":")
    known = TPUS | GPUS
    if chip not in known:
        raise ValueError(f"unknown chip {chip!r} in --topology {topology!r}; known: {', '.join(known)}")
    slices = TPUS[chip].slices if chip in TPUS else ()
    if chip in TPUS and shape and shape not in slices:
        raise ValueError(f"--topology {topology!r}: slices of {chip}: {', '.join(slices)} (or none: the smallest that fits)")
    if chip in GPUS and not (shape.isdecimal() and int(shape)):
        raise ValueError(f"--topology {topology!r}: of GPUs give the number, e.g. {chip}:64")
    return chip, known[chip], shape


def device_count(chip: str, shape: str) -> int:
    """Devices of a slice; a tpu7x chip has two."""
    count = 1
    for n in shape.split("x"):
        count *= int(n)
    return 2 * count if chip == "tpu7x" else count


# What JAX calls them.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def chip_of(device_kind: str) -> str | None:
    """Returns the name here of what `jax.Device.device_kind` names, e.g. `v5e`; None: it is unknown."""
    found = [name for name in KINDS if device_kind.startswith(name)]
    return KINDS[max(found, key=len)] if found else None


def accelerator_of(device_kind: str) -> Accelerator | None:
    """What `jax.Device.device_kind` names, if it is known."""
    chip = chip_of(device_kind)
    return None if chip is None else (TPUS | GPUS)[chip]
