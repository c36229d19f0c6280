"""Token mixers and the rest of a decoder layer (Flax NNX).

A mixer has one face: `mixer(x, *, positions, segment_ids, state=None) -> (y, state)` with x, y
[B, T, hidden], `init_state(batch, max_length, dtype)`; state None starts from nothing; and `state_axes()`, the same
structure with each array's logical axes in its place (`parallel.sharding.RULES`), one name or None for each dimension.
"""

from __future__ import annotations

import functools

from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.layers.attention import Attention
from hybrid_jax.layers.bmojo import BMojoF
from hybrid_jax.layers.gdn import GatedDeltaNet
from hybrid_jax.layers.gka import GatedKalmaNet
from hybrid_jax.layers.linear import Embedding, Linear, RMSNorm
from hybrid_jax.layers.mamba2 import Mamba2
from hybrid_jax.layers.mlp import MLP, MoE

__all__ = ["MIXERS", "MLP", "Embedding", "Linear", "MoE", "RMSNorm", "make_mixer"]

MIXERS = {
    ATTENTION: Attention,
    "swa": Attention,
    "gka": GatedKalmaNet,
    "gdn": GatedDeltaNet,
    "mamba2": Mamba2,
    "bmojo": BMojoF,
}


def make_mixer(kind: str, config: ModelConfig, layer: int, **kw):
    """A mixer of `kind` for layer `layer`; attention kinds get their window."""
    windows = {ATTENTION: config.attention_windows[layer], "swa": config.swa.window_size}
    mixer = MIXERS[kind]
    if kind in windows:
        mixer = functools.partial(mixer, window=windows[kind])
    return mixer(config, **kw)
