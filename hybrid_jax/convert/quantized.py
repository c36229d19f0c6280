"""Weights stored in fewer bits: integers in groups (read and written) and FP8 in blocks (read).

    integers in groups   X.weight  uint32 [out, in * bits / 32], the first value in the lowest bits
                         X.scales, X.biases [out, in / group];  w = scale * integer + bias
    FP8 in blocks        X.weight  float8_e4m3 [out, in]
                         X.weight_scale_inv [out / 128, in / 128], rounded up;  w = fp8 * scale of its block

The first is the layout of MLX, in which Llamba's small models are published (arXiv 2502.14458); the second is that of the FP8
releases of Qwen3 and DeepSeek. Both are read as dense weights: what is computed with is not quantized.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from hybrid_jax.checks import check_choice, check_integer
from hybrid_jax.convert.tensor_file import DTYPES, FileTensor
from hybrid_jax.schema import mapping

KEYS = ("quantization", "quantization_config")  # of config.json; MLX's own, and transformers'
BITS = (4, 8)
_BAND = 1 << 22  # values that are converted at a time


@dataclasses.dataclass(frozen=True)
class Groups:
    """Integers in groups along the inputs of a linear map, each group with a scale and a bias.

    Args:
      bits: of an integer, 4 or 8.
      group_size: values that share a scale and a bias, a multiple of 8.
    """

    bits: int
    group_size: int = 64

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits of a quantized weight must be 4 or 8, got {self.bits!r}")
        check_integer("group_size", self.group_size, minimum=8)
        if self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, got {self.group_size}")

    def planned(self, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns the dtype and shape of the tensors that hold a weight, by the ends of their names."""
        rows, columns = shape
        groups = dtype, (rows, columns // self.group_size)
        return {"weight": (np.dtype(np.uint32), (rows, columns * self.bits // 32)), "scales": groups, "biases": groups}

    def quantize(self, weight: np.ndarray, dtype: Any = None) -> dict[str, np.ndarray]:
        """Quantizes a weight [out, in], or rows of it.

        A group's bias is its least value and its scale the range over 2^bits - 1, both rounded to `dtype` before the integers are
        chosen.

        Args:
          dtype: of scales and biases; default: the weight's.

        Returns:
          The tensors that hold it, by the ends of their names.
        """
        dtype, last = jnp.dtype(dtype or weight.dtype), 2**self.bits - 1
        out = {end: np.empty(shape, kind) for end, (kind, shape) in self.planned(weight.shape, dtype).items()}
        for rows in _bands(weight.shape):
            x = weight[rows].astype(np.float32)
            x = x.reshape(len(x), -1, self.group_size)
            bias = x.min(-1).astype(dtype)
            scale = ((x.max(-1) - bias.astype(np.float32)) / last).astype(dtype)
            step = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
            integers = np.clip(np.rint((x - bias.astype(np.float32)[..., None]) / step[..., None]), 0, last).astype(np.uint32)
            integers = integers.reshape(len(x), -1, 32 // self.bits) << (np.arange(32 // self.bits, dtype=np.uint32) * self.bits)
            out["weight"][rows] = np.bitwise_or.reduce(integers, axis=-1)
            out["scales"][rows], out["biases"][rows] = scale, bias
        return out

    def dequantize(self, weight: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        """Returns the weight [out, in], in the dtype of scales and biases."""
        per_word = 32 // self.bits
        shape = weight.shape[0], weight.shape[1] * per_word
        out, shifts = np.empty(shape, scales.dtype), np.arange(per_word, dtype=np.uint32) * self.bits
        for rows in _bands(shape):
            integers = (weight[rows][..., None] >> shifts & np.uint32(2**self.bits - 1)).astype(np.float32)
            integers = integers.reshape(len(integers), -1, self.group_size)
            scale, bias = (x[rows].astype(np.float32)[..., None] for x in (scales, biases))
            out[rows] = (scale * integers + bias).reshape(len(integers), -1)
        return out


@dataclasses.dataclass(frozen=True)
class Blocks:
    """FP8 (e4m3) with one scale for each block of rows x columns."""

    rows: int
    columns: int

    def dequantize(self, weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Returns the weight [out, in] in bfloat16."""
        out = np.empty(weight.shape, jnp.bfloat16)
        per_column = scales.astype(np.float32)[:, np.arange(weight.shape[1]) // self.columns]
        for rows in _bands(weight.shape):
            numbers = np.arange(rows.start, min(rows.stop, len(out))) // self.rows
            out[rows] = weight[rows].astype(np.float32) * per_column[numbers]
        return out


def _bands(shape: tuple[int, ...]) -> list[slice]:
    """Returns slices of rows that have about `_BAND` values each."""
    size = max(1, _BAND // max(1, shape[1]))
    return [slice(i, i + size) for i in range(0, shape[0], size)]


def check_quantizable(name: str, weight: np.ndarray) -> None:
    """Checks that the numbers of a weight, or of rows of it, are finite; one that is not would spoil its group.

    Raises:
      ValueError: names the tensor.
    """
    if not all(np.isfinite(weight[rows].astype(np.float32)).all() for rows in _bands(weight.shape)):
        raise ValueError(f"tensor {name} has numbers that are not finite, and cannot be quantized; repair the model first")


class QuantizationLoss:
    """What quantization costs: the bytes of the weights before and after, and the relative error (root mean square) of each."""

    def __init__(self):
        self.before = self.after = 0
        self._squares: dict[str, list[float]] = {}

    def add(self, name: str, weight: np.ndarray, parts: Mapping[str, np.ndarray], quantization: Groups) -> None:
        """Adds a weight, or rows of it, and the tensors that hold it."""
        self.before += weight.nbytes
        self.after += sum(part.nbytes for part in parts.values())
        again = quantization.dequantize(parts["weight"], parts["scales"], parts["biases"])
        totals = self._squares.setdefault(name, [0.0, 0.0])
        for rows in _bands(weight.shape):
            x, y = (a[rows].astype(np.float32) for a in (weight, again))
            totals[0] += float(np.sum((x - y) ** 2))
            totals[1] += float(np.sum(x**2))

    def errors(self) -> dict[str, float]:
        """Returns the relative error of every weight, by name."""
        return {name: (wrong / max(total, 1e-30)) ** 0.5 for name, (wrong, total) in self._squares.items()}

    def __str__(self) -> str:
        errors = self.errors()
        worst = max(errors, key=lambda name: errors[name])
        mean = (sum(e**2 for e in errors.values()) / len(errors)) ** 0.5
        return (
            f"{len(errors)} weights quantized: {self.after / 1e9:,.3f} GB instead of {self.before / 1e9:,.3f} "
            f"({self.after / self.before:.1%}); relative error {mean:.2%}, at most {errors[worst]:.2%} ({worst})"
        )


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight of a checkpoint, which is read as a dense tensor; its attributes are those of a `FileTensor`."""

    parts: Mapping[Literal["weight", "scales", "biases", "weight_scale_inv"], FileTensor]
    form: Groups | Blocks
    dtype: str
    shape: tuple[int, ...]

    @property
    def path(self) -> pathlib.Path:
        return self.parts["weight"].path

    def view(self) -> np.ndarray:
        """Returns the dense weight, computed anew."""
        return self.form.dequantize(*(part.view() for part in self.parts.values()))

    def hash(self) -> str:
        """Returns the SHA-256 of the bytes of its integers or FP8 numbers, in hexadecimal."""
        return self.parts["weight"].hash()


def read_quantization(config: Mapping[str, Any]) -> Groups | Blocks | None:
    """Reads how a config.json says that weights are stored.

    Raises:
      ValueError: in a way that is not supported, or that is contradictory.
    """
    found = {key: mapping(key, config[key]) for key in KEYS if config.get(key) is not None}
    forms = {key: _read_form(key, value) for key, value in found.items()}
    if len(set(forms.values())) > 1:
        raise ValueError(f"config.json: quantization and quantization_config contradict each other: {found}")
    return next(iter(forms.values()), None)


def _read_form(key: str, value: Mapping[str, Any]) -> Groups | Blocks:
    method = value.get("quant_method", "affine" if "bits" in value else None)
    if method == "affine":
        if unknown := [name for name in value if name not in ("bits", "group_size", "quant_method", "mode")]:
            raise ValueError(f"{key}: {unknown[0]} is not supported; layers that are stored in other bits are refused")
        check_choice(f"{key}.mode", value.get("mode", "affine"), ("affine",))
        return Groups(value.get("bits", 4), value.get("group_size", 64))
    if method == "fp8":
        check_choice(f"{key}.fmt", value.get("fmt", "e4m3"), ("e4m3",))
        block = value.get("weight_block_size")
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise ValueError(f"{key}.weight_block_size must be two numbers, such as [128, 128], got {block!r}")
        return Blocks(*(check_integer(f"{key}.weight_block_size", n, minimum=1) for n in block))
    raise ValueError(
        f"{key}: weights quantized as {method!r} are not read; known are 'fp8' in blocks and integers in groups (bits, "
        "group_size). Take the original checkpoint, or convert this one to bfloat16 first"
    )


def as_dense(
    tensors: Mapping[str, FileTensor], form: Groups | Blocks, path: pathlib.Path
) -> dict[str, FileTensor | QuantizedTensor]:
    """Returns the tensors of a directory with each quantized weight and its scales as one.

    Raises:
      ValueError: scales are missing, are alone, or do not have the weight's shape.
    """
    quantized = "U32" if isinstance(form, Groups) else "F8_E4M3"
    result: dict[str, FileTensor | QuantizedTensor] = {}
    used = set()
    for name, tensor in tensors.items():
        if tensor.dtype != quantized or not name.endswith(".weight"):
            continue
        module = name.removesuffix("weight")
        ends = ("scales", "biases") if isinstance(form, Groups) else ("weight_scale_inv",)
        if absent := [end for end in ends if module + end not in tensors]:
            raise ValueError(f"{path}: tensor {name} is quantized and {module}{absent[0]} is missing; download the files again")
        parts: dict[Any, FileTensor] = {"weight": tensor, **{end: tensors[module + end] for end in ends}}
        result[name] = _checked_tensor(name, parts, form, path)
        used |= {name, *(module + end for end in ends)}
    alone = [n for n in tensors if n not in used and n.endswith((".scales", ".biases", ".weight_scale_inv"))]
    if alone:
        raise ValueError(f"{path}: tensor {alone[0]} belongs to no quantized weight; download the files again")
    return {name: result.get(name, tensor) for name, tensor in tensors.items() if name in result or name not in used}


def _checked_tensor(name: str, parts: Mapping[Any, FileTensor], form: Groups | Blocks, path: pathlib.Path) -> QuantizedTensor:
    weight, *scales = parts.values()
    if len(weight.shape) != 2:
        raise ValueError(f"{path}: tensor {name} is quantized and has shape {weight.shape}; expected two dimensions")
    if isinstance(form, Groups):
        shape = weight.shape[0], weight.shape[1] * 32 // form.bits
        wanted = shape[0], math.ceil(shape[1] / form.group_size)
        fits = shape[1] % form.group_size == 0
    else:
        shape, fits = weight.shape, True
        wanted = math.ceil(shape[0] / form.rows), math.ceil(shape[1] / form.columns)
    for tensor in scales:
        if not fits or tensor.shape != wanted or tensor.dtype not in DTYPES or tensor.dtype != scales[0].dtype:
            raise ValueError(
                f"{path}: the scales of tensor {name} {shape} have shape {tensor.shape} and dtype {tensor.dtype}; {form} needs "
                f"{wanted} of one floating-point dtype"
            )
    return QuantizedTensor(parts, form, scales[0].dtype if isinstance(form, Groups) else "BF16", shape)
