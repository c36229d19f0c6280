"""The table of tensor names: our parameters <-> a Hugging Face checkpoint's tensors.

    ours                                   theirs                               layout
    embed_tokens.embedding                 model.embed_tokens.weight            same
    layers.N.MIXER.q_conv1d.kernel [D,W]   ....q_conv1d.weight [D,1,W]          conv
    layers.N.mlp.experts.gate_proj [E,i,o] ....experts.e.gate_proj.weight       experts: one per expert, transposed, or
                                           ....experts.gate_up_proj [E,2o,i]    one for all of them (`ModelConfig.stacked_experts`)
    X.kernel [in,out]                      X.weight [out,in]                    transposed
    norms, biases, A_log, D, dt_bias       the same                             same

Everything but `lm_head` has the prefix `model.` there. The layout is a mark of the parameter (`layers.parameter`). A family may
keep several of our linear maps in one tensor (`Family.fused`), of which each is some rows, in one range or in one range of each
group of rows (`Family.groups`), or have other names (`Family.names`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from hybrid_jax.config import ModelConfig
from hybrid_jax.families import FAMILIES
from hybrid_jax.layers.parameter import Layout

Convert = Callable[[np.ndarray], np.ndarray]


class Rows(NamedTuple):
    """Rows of a tensor that has `total`, along `axis`: start ... stop - 1 of every range (start, stop), in order."""

    ranges: tuple[tuple[int, int], ...]
    total: int
    axis: int = 0

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """Returns these rows of a tensor; one range is a view of it."""
        parts = [tensor[along(self.axis, start, stop)] for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.axis)

    def pieces(self, value: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each range's part of a value that has these rows, with the number of its first row in the tensor."""
        begin = 0
        for start, stop in self.ranges:
            yield start, value[along(self.axis, begin, begin + stop - start)]
            begin += stop - start


def along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """Returns the index of rows start ... stop - 1 along an axis."""
    return (*(slice(None),) * axis, slice(start, stop))


class Tensor(NamedTuple):
    """One tensor of a checkpoint (or `rows` of it), and how to convert one of our parameters (or an expert's slice of it) to it
    and back."""

    name: str
    to_hf: Convert
    from_hf: Convert
    expert: int | None = None
    rows: Rows | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the complete tensor, of that of our parameter."""
        alone = self.to_hf(np.broadcast_to(np.int8(0), shape if self.expert is None else shape[1:])).shape
        return alone if self.rows is None else (*alone[: self.rows.axis], self.rows.total, *alone[self.rows.axis + 1 :])


def _same(x):
    return x


# Layout of a parameter (or of one expert's slice) -> (ours to theirs, theirs to ours).
LAYOUTS: dict[Layout, tuple[Convert, Convert]] = {
    "same": (_same, _same),
    "transposed": (np.transpose, np.transpose),
    "experts": (np.transpose, np.transpose),
    "conv": (lambda x: x[:, None, :], lambda x: x[:, 0, :]),
}


def _in_fused(name: str, config: ModelConfig) -> tuple[str, Rows | None]:
    """Returns our parameter's name with the module that the family keeps it in, and its rows there; None: it is alone."""
    match, family = re.fullmatch(r"(layers\.\d+\.)(.+)\.(kernel|bias)", name), FAMILIES[config.family]
    for theirs, parts in family.fused(config).items():
        if match is not None and match[2] in parts:
            total, groups = sum(parts.values()), family.groups(config).get(theirs, 1)
            ours, sizes = list(parts), [size // groups for size in parts.values()]
            start, size = sum(sizes[: ours.index(match[2])]), parts[match[2]] // groups
            ranges = tuple((first, first + size) for first in range(start, total, total // groups))
            return f"{match[1]}{theirs}.{match[3]}", Rows(ranges, total)
    return name, None


def _swapped(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, 1, 2)


def _in_stack(name: str, config: ModelConfig) -> Tensor:
    """Returns the tensor that holds one of the maps of all experts of a layer, under our name for it: gate and up share one."""
    module, _, leaf = name.rpartition(".")
    inputs_first = FAMILIES[config.family].stacked_experts
    convert, axis = (_same, 2) if inputs_first else (_swapped, 1)
    if leaf == "down_proj":
        return Tensor(name, convert, convert)
    width = config.moe.intermediate_size if config.moe else 0
    start = 0 if leaf == "gate_proj" else width
    return Tensor(f"{module}.gate_up_proj", convert, convert, rows=Rows(((start, start + width),), 2 * width, axis))


def hf_tensors(name: str, layout: Layout, config: ModelConfig) -> list[Tensor]:
    """Returns the checkpoint tensors that make our parameter `name`, in order.

    Args:
      name: of our parameter.
      layout: the mark of the parameter (`layers.parameter.Marks`).
      config: of the model.
    """

    def theirs(name: str) -> str:
        name = name if name.startswith("lm_head") else f"model.{name}"
        for ours, other in FAMILIES[config.family].names.items():
            name = name.replace(ours, other)
        return name

    if layout == "experts" and (config.stacked_experts or FAMILIES[config.family].stacked_experts):
        tensor = _in_stack(name, config)
        return [tensor._replace(name=theirs(tensor.name))]
    if layout == "experts":
        module, _, leaf = name.rpartition(".")
        count = config.moe.num_experts if config.moe else 0
        return [Tensor(theirs(f"{module}.{e}.{leaf}.weight"), *LAYOUTS[layout], e) for e in range(count)]
    name, rows = _in_fused(name, config)
    return [Tensor(theirs(re.sub(r"\.(kernel|embedding)$", ".weight", name)), *LAYOUTS[layout], rows=rows)]
