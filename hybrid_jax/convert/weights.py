"""The safetensors files of a directory: which files are read, and which tensors they may hold."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from hybrid_jax.files import read_json
from hybrid_jax.parallel.distributed import notice

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# The dtypes that weights may have, by safetensors' names. Others are quantized or no weights at all.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
STORED_AS = {name: stored for stored, name in DTYPES.items()}
ROWS = 4096  # rows of two tensors that are compared at a time
CHUNK = 1 << 24  # bytes that are read at a time
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def _shards(path: pathlib.Path) -> list[str]:
    """The file names in an index, each the name of a file in the same directory.

    Raises:
      ValueError: the index has another shape, or names a file elsewhere.
    """
    table = read_json(path / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path / INDEX} must have a 'weight_map' of tensor names to file names; download it again")
    for tensor, shard in table.items():
        fits = isinstance(shard, str) and 0 < len(shard) < 256 and shard.isprintable()
        if not fits or "\\" in shard or pathlib.PurePath(shard).name != shard or shard == "..":
            raise ValueError(
                f"{path / INDEX}: tensor {tensor[:200]!r} is in {str(shard)[:200]!r}; expected the name of a file in the same "
                "directory, without a path"
            )
    return sorted(set(table.values()))


def weight_files(path: pathlib.Path) -> list[str]:
    """The files that hold a directory's weights. As in transformers, `model.safetensors` goes before an index.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: as `_shards`.
    """
    if (path / SINGLE).is_file():
        if (path / INDEX).is_file():
            notice(f"{path} has both {SINGLE} and {INDEX}: {SINGLE} is read and the index ignored, as transformers does")
        return [SINGLE]
    if not (path / INDEX).is_file():
        kinds = sorted({p.suffix for p in path.iterdir()})
        raise FileNotFoundError(
            f"{path} has neither {SINGLE} nor {INDEX} (file endings there: {', '.join(kinds)}); only safetensors weights are read"
        )
    shards = _shards(path)
    missing = [s for s in shards if not (path / s).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; download them again"
        )
    return shards


class FileTensor(NamedTuple):
    """Where a tensor is: its file, its dtype by safetensors' name, its shape, where its bytes begin in the file, and how many."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def view(self) -> np.ndarray:
        """Returns the tensor as a view of the file, of which only what is used is read; it cannot be written."""
        dtype = jnp.dtype(DTYPES[self.dtype])
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype)
        return np.memmap(self.path, dtype, "r", self.offset, self.shape)

    def hash(self) -> str:
        """Returns the SHA-256 of the tensor's bytes, in hexadecimal."""
        found = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for begin in range(0, self.size, CHUNK):
                found.update(file.read(min(CHUNK, self.size - begin)))
        return found.hexdigest()


def _read_header(path: pathlib.Path) -> dict[str, FileTensor]:
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


class TensorFiles(Mapping[str, FileTensor]):
    """The tensors of a directory's safetensors files, sharded or not, by name; the files' headers are read and checked at once.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a wrong index, a file that is truncated or not safetensors, or a tensor that is in two files.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.tensors: dict[str, FileTensor] = {}
        for shard in weight_files(path):
            for name, tensor in _read_header(path / shard).items():
                if name in self.tensors:
                    raise ValueError(
                        f"{path}: tensor {name} is in both {self.tensors[name].path.name} and {shard}; remove it from one of them"
                    )
                self.tensors[name] = tensor

    def __getitem__(self, name: str) -> FileTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check_layers(self, layers: int) -> None:
        """Checks by the tensors' names that there are as many layers, before a model of so many is described.

        Raises:
          ValueError: there are not.
        """
        found = {int(match[1]) for name in self if (match := re.search(r"\.layers\.(\d{1,9})\.", name))}
        if found and len(found) != layers:
            raise ValueError(
                f"{self.path}: the tensors do not fit config.json: it has num_hidden_layers {layers:,}, the files hold tensors of "
                f"{len(found):,} layers"
            )

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Checks by the files' headers that tensors have a dtype of weights.

        Raises:
          ValueError: one has not; names it.
        """
        double = []
        for name in names:
            dtype = self[name].dtype
            if dtype not in DTYPES:
                raise ValueError(
                    f"{self.path}: tensor {name} has dtype {dtype}, weights must be {', '.join(DTYPES.values())}; "
                    "convert the checkpoint to bfloat16 or float32 first (a quantized one: take the original)"
                )
            if dtype == "F64":
                double.append(name)
        if double:
            notice(f"{self.path}: {len(double)} tensors are float64 and are read as float32, the first {double[0]}")

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks by the files' headers that tensors have these shapes.

        Raises:
          ValueError: one has not; names it.
        """
        for name, shape in shapes.items():
            has = self[name].shape
            if has != tuple(shape):
                raise ValueError(f"{self.path}: tensor {name} must have shape {tuple(shape)} by config.json, it has {has}")

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; reads a few rows of them at a time."""
        a, b = self[one], self[other]
        if a.shape != b.shape or not a.shape or not {a.dtype, b.dtype} <= set(DTYPES):
            return False
        left, right = a.view(), b.view()
        return all(np.array_equal(left[i : i + ROWS], right[i : i + ROWS]) for i in range(0, a.shape[0], ROWS))


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
            header[name] = {"dtype": STORED_AS[dtype.name], "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
            self.place[name] = path, end
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name in names:
            self.place[name] = path, self.place[name][1] + 8 + len(text)

    def write(self, name: str, value: np.ndarray, row: int = 0) -> None:
        """Writes a tensor, or rows of it from number `row` on, in the planned dtype."""
        dtype, shape = self.planned[name]
        if value.shape[1:] != shape[1:] or row + len(np.atleast_1d(value)) > (shape[0] if shape else 1):
            raise ValueError(f"tensor {name}: rows {row} ... of shape {value.shape} do not fit into {shape}")
        path, begin = self.place[name]
        data = np.ascontiguousarray(value.astype(dtype, copy=False)).reshape(-1).view(np.uint8)
        with open(path, "r+b") as file:
            file.seek(begin + row * dtype.itemsize * math.prod(shape[1:]))
            file.write(data.data)
        self.missing[name] -= data.nbytes

    def check_complete(self) -> None:
        """Checks that every byte was written.

        Raises:
          ValueError: some were not, or some twice; names the first tensor.
        """
        if wrong := [name for name, size in self.missing.items() if size]:
            raise ValueError(f"tensor {wrong[0]} was not written completely ({self.missing[wrong[0]]} bytes are missing)")
