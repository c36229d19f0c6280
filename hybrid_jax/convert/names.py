"""The table of tensor names: our parameters <-> a Hugging Face checkpoint's tensors.

    ours                                   theirs                               what changes
    embed_tokens.embedding                 model.embed_tokens.weight            –
    layers.N.MIXER.q_conv1d.kernel [D,W]   ....q_conv1d.weight [D,1,W]          an axis
    layers.N.mlp.experts.gate_proj [E,i,o] ....experts.e.gate_proj.weight       one a expert, transposed
    X.kernel [in,out]                      X.weight [out,in]                    transposed
    norms, biases, A_log, D, dt_bias       the same                             –

Everything but `lm_head` has the prefix `model.` there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hybrid_jax.config import ModelConfig


class Tensor(NamedTuple):
    """One tensor of a checkpoint and how it meets one of our parameters (an expert's slice of it)."""

    name: str
    to_hf: Callable[[np.ndarray], np.ndarray]
    from_hf: Callable[[np.ndarray], np.ndarray]
    expert: int | None = None


def _same(x):
    return x


def hf_tensors(name: str, config: ModelConfig) -> list[Tensor]:
    """The checkpoint tensors that make our parameter `name`, in order."""
    prefix = "" if name.startswith("lm_head") else "model."
    if match := re.fullmatch(r"(.*\.mlp\.experts)\.(\w+)", name):
        return [
            Tensor(f"{prefix}{match[1]}.{e}.{match[2]}.weight", np.transpose, np.transpose, e)
            for e in range(config.moe.num_experts)
        ]
    if name.endswith("conv1d.kernel"):
        hf = prefix + name.removesuffix("kernel") + "weight"
        return [Tensor(hf, lambda x: x[:, None, :], lambda x: x[:, 0, :])]
    if name.endswith(".kernel"):
        return [Tensor(prefix + name.removesuffix("kernel") + "weight", np.transpose, np.transpose)]
    return [Tensor(prefix + name.replace("embed_tokens.embedding", "embed_tokens.weight"), _same, _same)]
