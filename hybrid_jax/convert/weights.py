"""The safetensors files of a directory: which files are read, and which tensors they may hold."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open

from hybrid_jax.convert.names import Rows
from hybrid_jax.files import read_json
from hybrid_jax.parallel.distributed import notice

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# The dtypes that weights may have, by safetensors' names. Others are quantized or no weights at all.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
ROWS = 4096  # rows of two tensors that are compared at a time
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


def _check_header(path: pathlib.Path) -> None:
    """Checks what safetensors does not: that no tensor is described twice, of which it would silently take the last.

    The size of the header, the offsets and the shapes are checked by safetensors, without reading a tensor.

    Raises:
      ValueError: the file is too short for its header, the header is too long, or it holds a name twice.
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
        json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(
            f"{path} is truncated or not a safetensors file (its header is not JSON: {e}); download it again"
        ) from None


class TensorFiles(contextlib.ExitStack):
    """The safetensors files of a directory, sharded or not, opened and checked at once; `shards`: tensor -> its file's name.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a wrong index, a file that is truncated or not safetensors, or a tensor that is in two files.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path, self.files, self.shards = path, {}, {}
        for shard in weight_files(path):
            _check_header(path / shard)
            try:
                file = self.enter_context(safe_open(path / shard, framework="numpy"))
            except SafetensorError as e:
                raise ValueError(f"{path / shard} is truncated or not a safetensors file ({e}); download it again") from None
            for name in file.keys():  # noqa: SIM118
                if name in self.shards:
                    raise ValueError(
                        f"{path}: tensor {name} is in both {self.shards[name]} and {shard}; remove it from one of them"
                    )
                self.files[name], self.shards[name] = file, shard

    def __iter__(self):
        return iter(self.files)

    def check_layers(self, layers: int) -> None:
        """Checks by the tensors' names that there are as many layers, before a model of so many is described.

        Raises:
          ValueError: there are not.
        """
        found = {int(match[1]) for name in self.files if (match := re.search(r"\.layers\.(\d{1,9})\.", name))}
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
            dtype = self.files[name].get_slice(name).get_dtype()
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
            has = tuple(self.files[name].get_slice(name).get_shape())
            if has != tuple(shape):
                raise ValueError(f"{self.path}: tensor {name} must have shape {tuple(shape)} by config.json, it has {has}")

    def read(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """One tensor, or rows of it."""
        return self.files[name].get_tensor(name) if rows is None else self.files[name].get_slice(name)[rows.start : rows.stop]

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; reads a few rows of them at a time."""
        a, b = (self.files[name].get_slice(name) for name in (one, other))
        if a.get_shape() != b.get_shape() or not a.get_shape() or not {a.get_dtype(), b.get_dtype()} <= set(DTYPES):
            return False
        rows = a.get_shape()[0]
        parts = (slice(i, min(i + ROWS, rows)) for i in range(0, rows, ROWS))
        return all(np.array_equal(a[part], b[part]) for part in parts)
