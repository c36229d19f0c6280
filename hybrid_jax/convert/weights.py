"""The safetensors files of a directory: which files are read, and which tensors they may hold."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from hybrid_jax.convert.quantized import Blocks, Groups, as_dense
from hybrid_jax.convert.tensor_file import DTYPES, FileTensor, StoredTensor, read_header
from hybrid_jax.files import read_json
from hybrid_jax.parallel.distributed import notice

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ROWS = 4096  # rows of two tensors that are compared at a time


def named_shards(path: pathlib.Path) -> list[str]:
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
      ValueError: as `named_shards`.
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
    shards = named_shards(path)
    missing = [s for s in shards if not (path / s).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; download them again"
        )
    return shards


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of a directory's safetensors files, sharded or not, by name; the files' headers are read and checked at once.

    Args:
      path: the directory.
      quantization: how some of them are stored (`quantized.read_quantization`); these appear as dense tensors.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a wrong index, a file that is truncated or not safetensors, or a tensor that is in two files.
    """

    def __init__(self, path: pathlib.Path, quantization: Groups | Blocks | None = None):
        self.path = path
        found: dict[str, FileTensor] = {}
        for shard in weight_files(path):
            for name, tensor in read_header(path / shard).items():
                if name in found:
                    raise ValueError(
                        f"{path}: tensor {name} is in both {found[name].path.name} and {shard}; remove it from one of them"
                    )
                found[name] = tensor
        self._tensors = found if quantization is None else as_dense(found, quantization, path)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def check_layers(self, layers: int, ignored: tuple[str, ...] = ()) -> None:
        """Checks by the tensors' names that there are as many layers, before a model of so many is described.

        Args:
          ignored: what the names of tensors begin with that do not count.

        Raises:
          ValueError: there are not.
        """
        names = (name for name in self if not name.startswith(ignored))
        found = {int(match[1]) for name in names if (match := re.search(r"\.layers\.(\d{1,9})\.", name))}
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
