"""How a parameter is treated by the rest of the project, stated where it is made."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

Layout = Literal["same", "transposed", "conv", "experts"]


@dataclasses.dataclass(frozen=True)
class Marks:
    """How one parameter is sharded, computed with, trained and stored.

    The defaults suit a vector or an unusual parameter: used in its own dtype, never rounded, not decayed, updated by AdamW,
    stored as it is.

    Args:
      axes: the logical axis of each dimension (a key of `parallel.sharding.RULES`) or None.
      compute: it is cast to the compute dtype before use, and then all-gathered over the axes that shard `embed`
        (in this order half the bytes travel). Otherwise the layer gets it in its own dtype, and the compiler moves it.
      frozen: while it does not train, it is kept in the phase's `frozen_dtype`.
      decay: it takes weight decay.
      muon: Muon updates it, as a matrix in its last two dimensions; otherwise AdamW does.
      zero: it begins at 0, however new parameters are drawn.
      layout: how a Hugging Face checkpoint stores it: "same", "transposed" ([in, out] as [out, in]), "conv" ([D, W] as
        [D, 1, W]) or "experts" ([E, in, out] as one [out, in] per expert).
    """

    axes: tuple[str | None, ...]
    compute: bool = False
    frozen: bool = False
    decay: bool = False
    muon: bool = False
    zero: bool = False
    layout: Layout = "same"


def parameter(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    compute: bool = False,
    frozen: bool = False,
    decay: bool = False,
    muon: bool = False,
    zero: bool = False,
    layout: Layout = "same",
) -> nnx.Param:
    """Returns a parameter with its `Marks`, which see. A matrix of a linear map has all four marks and is "transposed"."""
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} needs an axis for each dimension, got {axes}")
    return nnx.Param(value, marks=Marks(tuple(axes), compute, frozen, decay, muon, zero, layout))


def marks_of(variable: nnx.Variable) -> Marks:
    """Returns the marks of a parameter.

    Raises:
      TypeError: it was not made with `parameter`.
    """
    marks = variable.get_metadata().get("marks")
    if not isinstance(marks, Marks):
        raise TypeError("a parameter has no marks: make it with hybrid_jax.layers.parameter.parameter")
    return marks
