"""Token mixers and the rest of a decoder layer (Flax NNX). `layers.mixer.Mixer` is the contract of a mixer."""

from __future__ import annotations

import functools
from typing import Any

from hybrid_jax.config import ATTENTION, MixerSpec, ModelConfig
from hybrid_jax.layers.attention import Attention, SlidingWindowAttention
from hybrid_jax.layers.bmojo import BMojoF
from hybrid_jax.layers.discrete_mamba2 import DiscreteMamba2
from hybrid_jax.layers.gdn import GatedDeltaNet
from hybrid_jax.layers.gka import GatedKalmaNet
from hybrid_jax.layers.head_hybrid import HeadHybrid
from hybrid_jax.layers.linear import Embedding, LayerNorm, Linear, RMSNorm, source_norm
from hybrid_jax.layers.mamba2 import Mamba2
from hybrid_jax.layers.mamba3 import Mamba3
from hybrid_jax.layers.mixer import Mixer
from hybrid_jax.layers.mlp import MLP, MoE
from hybrid_jax.mixers import KINDS

__all__ = [
    "MIXERS", "MLP", "Embedding", "LayerNorm", "Linear", "Mixer", "MoE", "RMSNorm", "make_mixer", "mixer_class",
    "output_projections", "source_norm",
]  # fmt: skip

# Mixer kind (a key of `hybrid_jax.mixers.KINDS`) -> its layer.
MIXERS: dict[str, type[Mixer]] = {
    ATTENTION: Attention,
    "gka": GatedKalmaNet,
    "gdn": GatedDeltaNet,
    "mamba2": Mamba2,
    "discrete_mamba2": DiscreteMamba2,
    "mamba3": Mamba3,
    "swa": SlidingWindowAttention,
    "bmojo": BMojoF,
}


def mixer_class(kind: str, config: ModelConfig, layer: int) -> type[Mixer]:
    """Returns the class of the mixer of `kind` in layer number `layer`.

    Heads of attention are kept beside the layer's own mixer, not beside a fused layer's teacher.
    """
    spec = config.layers[layer]
    return HeadHybrid if spec.attention_heads and kind == spec.kind else MIXERS[kind]


def make_mixer(kind: str, config: ModelConfig, layer: int, **kw: Any) -> Mixer:
    """Returns a new mixer of `kind` for layer number `layer`; `kw` are the constructor's `rngs` and `dtype`."""
    return mixer_class(kind, config, layer)(config, layer, **kw)


def output_projections(mixer: Any, spec: MixerSpec, num_heads: int) -> list[tuple[Linear, tuple[int, ...]]]:
    """Returns the linear maps behind the heads of a layer's mixer, each with the numbers of the heads that are its input.

    A hybrid of heads has two: that of its recurrent mixer, which has all heads, and that of the kept heads.
    """
    kept = isinstance(mixer, HeadHybrid)
    own: Any = functools.reduce(getattr, KINDS[spec.kind].output.split("."), mixer.recurrent if kept else mixer)
    return [(own, tuple(range(num_heads))), *([(mixer.attention.o_proj, spec.attention_heads)] if kept else [])]
