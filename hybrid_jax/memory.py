"""What a sequence holds while it is decoded: the bytes of keys, values and states, by kind of mixer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.head_hybrid import HeadHybridState
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import abstract_decoder

KEPT_HEADS = "kept heads"


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_bytes_by_kind(config: ModelConfig, length: int, *, rows: int = 1, dtype: str = "bfloat16") -> dict[str, int]:
    """Returns symbol of a mixer kind (`*`, `GDN`, ...) -> the bytes that all its layers hold; nothing is allocated.

    Heads of attention that are kept beside a recurrent mixer (`GDN[3,17]`) count as "kept heads", their mixer as `GDN`.

    Args:
      length: tokens that there is room for.
      rows: sequences.
      dtype: of keys, values and convolution tails; recurrent states have the dtype that their layer gives them.
    """
    model = abstract_decoder(config, compute_dtype=jnp.dtype(dtype))
    states = jax.eval_shape(lambda: model.empty_state(rows, length))
    found: dict[str, int] = {}
    for spec, state in zip(config.layers, states, strict=True):
        parts = {KINDS[spec.kind].symbol: state}
        if isinstance(state, HeadHybridState):
            parts = {KINDS[spec.kind].symbol: state.recurrent, KEPT_HEADS: state.attention}
        for kind, part in parts.items():
            found[kind] = found.get(kind, 0) + _bytes(part)
    return found


def state_bytes(config: ModelConfig, length: int, *, rows: int = 1, dtype: str = "bfloat16") -> int:
    """Returns the sum of `state_bytes_by_kind`: the bytes of all devices together if nothing is replicated."""
    return sum(state_bytes_by_kind(config, length, rows=rows, dtype=dtype).values())
