"""The table of tensor names: our parameters <-> a Hugging Face checkpoint's tensors.

    ours                                   theirs                               layout
    embed_tokens.embedding                 model.embed_tokens.weight            same
    layers.N.MIXER.q_conv1d.kernel [D,W]   ....q_conv1d.weight [D,1,W]          conv
    layers.N.mlp.experts.gate_proj [E,i,o] ....experts.e.gate_proj.weight       experts: one per expert, transposed
    X.kernel [in,out]                      X.weight [out,in]                    transposed
    norms, biases, A_log, D, dt_bias       the same                             same

Everything but `lm_head` has the prefix `model.` there. The layout is a mark of the parameter (`layers.parameter`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.parameter import Layout

Convert = Callable[[np.ndarray], np.ndarray]


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and how to convert one of our parameters (or an expert's slice of it) to it and back."""

    name: str
    to_hf: Convert
    from_hf: Convert
    expert: int | None = None


def _same(x):
    return x


# Layout of a parameter (or of one expert's slice) -> (ours to theirs, theirs to ours).
LAYOUTS: dict[Layout, tuple[Convert, Convert]] = {
    "same": (_same, _same),
    "transposed": (np.transpose, np.transpose),
    "experts": (np.transpose, np.transpose),
    "conv": (lambda x: x[:, None, :], lambda x: x[:, 0, :]),
}


def hf_tensors(name: str, layout: Layout, config: ModelConfig) -> list[Tensor]:
    """Returns the checkpoint tensors that make our parameter `name`, in order.

    Args:
      name: of our parameter.
      layout: the mark of the parameter (`layers.parameter.Marks`).
      config: of the model.
    """
    prefix = "" if name.startswith("lm_head") else "model."
    if layout == "experts":
        module, _, leaf = name.rpartition(".")
        count = config.moe.num_experts if config.moe else 0
        return [Tensor(f"{prefix}{module}.{e}.{leaf}.weight", *LAYOUTS[layout], e) for e in range(count)]
    return [Tensor(prefix + re.sub(r"\.(kernel|embedding)$", ".weight", name), *LAYOUTS[layout])]
