"""Writing safetensors files, in any order and row by row."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from hybrid_jax.convert.tensor_file import STORED_DTYPES, FileTensor
from hybrid_jax.convert.weights import INDEX, SINGLE

_NAMES = {name: stored for stored, name in STORED_DTYPES.items()}  # of dtypes
_CHUNK = 1 << 26  # bytes that are copied at a time


def _copy_bytes(source: BinaryIO, start: int, file: BinaryIO, begin: int, size: int) -> int:
    """Copies up to `size` bytes from `start` of one file to `begin` of another, in the kernel where it can; returns how many."""
    if hasattr(os, "copy_file_range"):
        try:
            if copied := os.copy_file_range(source.fileno(), file.fileno(), size, start, begin):
                return copied
        except OSError as error:  # another disk, a file system or a container that does not allow it
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
    source.seek(start)
    file.seek(begin)
    return file.write(source.read(size))


class WeightWriter:
    """Writes tensors into safetensors files whose headers come first: in any order, row by row, none held in memory.

    Args:
      directory: where the files are made; one file `model.safetensors`, or several with an index.
      planned: the dtype and shape of every tensor, by name.
      max_shard_bytes: of one file; a larger tensor is alone in one.
    """

    def __init__(self, directory: pathlib.Path, planned: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_shard_bytes: int):
        sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in planned.items()}
        shards: list[list[str]] = [[]]
        for name, size in sizes.items():
            if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > max_shard_bytes:
                shards.append([])
            shards[-1].append(name)
        files = (
            [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        )
        self.planned, self.missing = planned, dict(sizes)
        self.place: dict[str, tuple[pathlib.Path, int]] = {}
        for file, names in zip(files, shards, strict=True):
            self._begin(directory / file, sorted(names, key=lambda n: -planned[n][0].itemsize), sizes)
        if len(shards) > 1:
            weight_map = {name: self.place[name][0].name for name in planned}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, path: pathlib.Path, names: list[str], sizes: Mapping[str, int]) -> None:
        """Writes a file's header; larger items go first, so that every tensor is aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            dtype, shape = self.planned[name]
            header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
            self.place[name] = path, end
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name in names:
            self.place[name] = path, self.place[name][1] + 8 + len(text)

    def write(self, name: str, value: np.ndarray, row: int = 0, axis: int = 0) -> None:
        """Writes a tensor, or rows of it along `axis` from number `row` on, in the planned dtype."""
        dtype, shape = self.planned[name]
        value, full = np.atleast_1d(value), shape or (1,)
        fits = value.ndim == len(full) and value.shape[:axis] == full[:axis] and value.shape[axis + 1 :] == full[axis + 1 :]
        if not fits or row + value.shape[axis] > full[axis]:
            raise ValueError(f"tensor {name}: rows {row} ... of shape {value.shape} do not fit into {shape}")
        path, begin = self.place[name]
        blocks = value.reshape(math.prod(value.shape[:axis]), *value.shape[axis:])  # each is a run of bytes in the file
        size = dtype.itemsize * math.prod(full[axis + 1 :])  # of a row
        with open(path, "r+b") as file:
            for n, block in enumerate(blocks):
                data = np.ascontiguousarray(block.astype(dtype, copy=False)).reshape(-1).view(np.uint8)
                file.seek(begin + (n * full[axis] + row) * size)
                file.write(data.data)
        self.missing[name] -= dtype.itemsize * value.size

    def copy(self, name: str, stored: FileTensor) -> None:
        """Writes a tensor that has the planned dtype and shape in another file; its bytes pass through the system alone.

        Raises:
          ValueError: it has another dtype or shape, or its file has become shorter.
        """
        dtype, shape = self.planned[name]
        if (STORED_DTYPES[stored.dtype], stored.shape) != (dtype.name, shape):
            raise ValueError(f"tensor {name}: {stored.dtype} {stored.shape} is not the planned {dtype.name} {shape}")
        path, begin = self.place[name]
        with open(stored.path, "rb", buffering=0) as source, open(path, "r+b", buffering=0) as file:
            copied = 0
            while copied < stored.size:
                size = _copy_bytes(source, stored.offset + copied, file, begin + copied, min(stored.size - copied, _CHUNK))
                if not size:
                    raise ValueError(f"{stored.path} ends in the middle of a tensor; something has changed it")
                copied += size
        self.missing[name] -= copied

    def check_complete(self) -> None:
        """Checks that every byte was written.

        Raises:
          ValueError: some were not, or some twice; names the first tensor.
        """
        if wrong := [name for name, size in self.missing.items() if size]:
            raise ValueError(f"tensor {wrong[0]} was not written completely ({self.missing[wrong[0]]} bytes are missing)")
