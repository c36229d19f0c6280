"""One safetensors file: its header, checked, and its tensors as views of the file."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import pathlib
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

# The dtypes that weights may have, by safetensors' names. Others are quantized or no weights at all.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
STORED_DTYPES = DTYPES | {"F8_E4M3": "float8_e4m3fn", "U32": "uint32"}  # those of quantized weights too
_CHUNK = 1 << 24  # bytes that are read at a time
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


class StoredTensor(Protocol):
    """A tensor of a checkpoint: in one file as it is, or quantized in several parts (`quantized`)."""

    @property
    def path(self) -> pathlib.Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def view(self) -> np.ndarray: ...
    def hash(self) -> str: ...


class FileTensor(NamedTuple):
    """Where a tensor is: its file, its dtype by safetensors' name, its shape, where its bytes begin in the file, and how many."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def view(self) -> np.ndarray:
        """Returns the tensor as a view of the file, of which only what is used is read; it cannot be written."""
        dtype = jnp.dtype(STORED_DTYPES[self.dtype])
        if not self.size:
            return np.zeros(self.shape, dtype)
        with open(self.path, "rb") as file:
            begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), self.offset + self.size - begin, access=mmap.ACCESS_READ, offset=begin)
        if hasattr(pages, "madvise"):
            pages.madvise(mmap.MADV_SEQUENTIAL)  # the system reads further ahead
        return np.frombuffer(pages, dtype, math.prod(self.shape), self.offset - begin).reshape(self.shape)

    def hash(self) -> str:
        """Returns the SHA-256 of the tensor's bytes, in hexadecimal."""
        found = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for begin in range(0, self.size, _CHUNK):
                found.update(file.read(min(_CHUNK, self.size - begin)))
        return found.hexdigest()


def read_header(path: pathlib.Path) -> dict[str, FileTensor]:
    """Reads the header of a safetensors file, by tensor.

    The offsets and the shapes are checked by safetensors; that no tensor is described twice, of which safetensors would silently
    take the last, and the header's length are checked here. No tensor is read.

    Raises:
      ValueError: the file is too short for its header, the header is too long, holds a name twice or is no header.
    """
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(
                f"{path} is truncated or not a safetensors file (its header would have {length:,} bytes, the file has {size:,}); "
                "download it again"
            )
        header = file.read(length)

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for n, (name, _) in enumerate(pairs) if name in dict(pairs[:n]))
            raise ValueError(f"{path}: its header describes {twice[:200]!r} twice; download it again")
        return found

    try:
        found = json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(
            f"{path} is truncated or not a safetensors file (its header is not JSON: {e}); download it again"
        ) from None
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as e:
        raise ValueError(f"{path} is truncated or not a safetensors file ({e}); download it again") from None
    begin = 8 + length
    return {
        name: FileTensor(
            path, t["dtype"], tuple(t["shape"]), begin + t["data_offsets"][0], t["data_offsets"][1] - t["data_offsets"][0]
        )
        for name, t in found.items()
        if name != "__metadata__"
    }
