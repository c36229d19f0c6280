"""Meshes: the five axes every program of this project may be spread over.

data, fsdp   rows of the batch
expert       rows of the batch, and the experts of a mixture
seq          tokens of a row (ring attention, state passing)
tensor       heads, MLP width, vocabulary

Parameters are sharded over fsdp, seq, expert and tensor, and gathered where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from hybrid_jax.checks import check_known
from hybrid_jax.config import ModelConfig

AXES = ("data", "fsdp", "expert", "seq", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=8,seq=4"` -> {"fsdp": 8, "seq": 4}.

    Raises:
      ValueError: a part is not AXIS=SIZE.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if not size.removeprefix("-").isdecimal() or name in sizes:
            raise ValueError(f"expected a mesh like 'fsdp=8,seq=4', got {text!r}")
        sizes[name] = int(size)
    check_known("the mesh", sizes, AXES)
    return sizes


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of each of the five axes: 1 where none is named, what is left of the devices where it is -1.

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    check_known("the mesh", sizes, AXES)
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, n in shape.items() if n == -1]
    fixed = math.prod(n for n in shape.values() if n != -1)
    if len(free) == 1 and fixed > 0 and devices % fixed == 0:
        shape[free[0]] = devices // fixed
    if min(shape.values()) < 1 or math.prod(shape.values()) != devices:
        asked = ", ".join(f"{a}={n}" for a, n in sizes.items()) or "(one device)"
        raise ValueError(f"the mesh {asked} needs {fixed} devices, there are {devices}; give sizes whose product is that")
    return shape


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all five axes; those not named have size 1, one of size -1 takes what is left.

    Args:
      devices: default: all of them; those of a TPU are laid out along its interconnect.

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(sizes, len(devices))
    grid = tuple(shape.values())
    if devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(grid, devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(grid)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh of these sizes without devices, which says how things would be sharded."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def divided_rows(mesh: Mesh | AbstractMesh | None, rows: int) -> int:
    """Returns the next number of rows that the mesh's batch axes divide; without a mesh the same."""
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return -(-rows // shards) * shards


def check_mesh_fits(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    batch_size: int | None = None,
    seq_len: int | None = None,
    teacher: ModelConfig | None = None,
) -> None:
    """Refuses a mesh that does not divide the model or the batch.

    Args:
      teacher: another model of the same program; its sizes must fit too, and one of the two must have experts for an axis of them.

    Raises:
      ValueError: names the axis, its size, the dimension and its size.
    """
    models = {"": config} if teacher is None else {"": config, " of the teacher": teacher}
    if mesh.shape["expert"] > 1 and all(model.moe is None for model in models.values()):
        raise ValueError("mesh axis 'expert' needs a mixture-of-experts model; this one has none, use 'fsdp' or 'data'")
    for whose, model in models.items():
        _check_divides(model, mesh, batch_size, seq_len, whose)


def _check_divides(config: ModelConfig, mesh: Mesh | AbstractMesh, batch_size: int | None, seq_len: int | None, whose: str) -> None:
    """Checks that the mesh divides one model and the batch; a message says `whose` sizes do not fit."""
    tensor, seq = mesh.shape["tensor"], mesh.shape["seq"]
    batch = math.prod(mesh.shape[a] for a in BATCH_AXES)
    moe, inner = config.moe, {"intermediate_size": config.intermediate_size}
    if moe is not None:
        inner = inner if any(config.dense_layers) else {}
        inner["moe_intermediate_size"] = moe.intermediate_size
        inner["shared_expert_intermediate_size"] = moe.shared_intermediate_size or 0
    wants = [
        ("tensor", tensor, "num_attention_heads", config.num_heads),
        ("tensor", tensor, "num_key_value_heads", config.num_kv_heads),
        *(("tensor", tensor, name, width) for name, width in inner.items()),
        ("tensor", tensor, "vocab_size", config.vocab_size),
        ("fsdp*seq*expert", mesh.shape["fsdp"] * seq * mesh.shape["expert"], "hidden_size", config.hidden_size),
        ("expert", mesh.shape["expert"], "num_experts", moe.num_experts if moe else 0),
    ]
    for cls in config.used_options():
        widths = config.options(cls).sharded_widths(config.num_heads, config.num_kv_heads, config.head_dim)
        wants += [("tensor", tensor, f"width of {name}", width) for name, width in widths.items()]
    if batch_size is not None:
        wants.append(("*".join(BATCH_AXES), batch, "batch_size", batch_size))
    if seq_len is not None and seq > 1:
        wants.append(("seq", 2 * seq, "seq_len", seq_len))
    for axis, parts, name, size in wants:
        if size % parts:
            twice = " (two chunks per device)" if axis == "seq" else ""
            raise ValueError(
                f"mesh axis {axis!r} divides {name}{whose} in {parts} shards{twice}, which do not divide {size}; "
                f"choose a mesh whose {axis!r} does, or another {name}"
            )
