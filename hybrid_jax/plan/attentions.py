"""Which attentions the layers of a model hold, counted for plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_jax.config import ATTENTION, MixerSpec, ModelConfig
from hybrid_jax.layers.attention import kv_heads_of
from hybrid_jax.mixers import KINDS


class AttentionHeads(NamedTuple):
    """Attention in a layer: its query and key-value heads, and how many keys a query sees at most (None: all before it).

    `ring`: its keys may be sent around the ring of `seq`; those of B'MOJO's windows never are. `sharded`: its heads are sharded
    over `tensor`; heads kept beside a recurrent mixer are replicated.
    """

    heads: int
    kv_heads: int
    window: int | None
    ring: bool = True
    sharded: bool = True


def attentions(config: ModelConfig, layers: Sequence[MixerSpec]) -> list[AttentionHeads]:
    """Returns every layer's attention, of the layers that have some."""
    found, all_heads = [], (config.num_heads, config.num_kv_heads)
    for spec, own in zip(layers, config.attention_windows[: len(layers)], strict=True):  # a stream may have no layers
        row = KINDS[spec.kind]
        if spec.kind == ATTENTION:
            found.append(AttentionHeads(*all_heads, own))
        elif row.attends and row.options is not None:
            window = config.options(row.options).window
            if own is not None and window is not None and not row.recurrent:
                window = min(own, window)
            found.append(AttentionHeads(*all_heads, window, ring=not row.recurrent))
        if kept := spec.attention_heads:
            found.append(AttentionHeads(len(kept), len(kv_heads_of(kept, config)), own, sharded=False))
    return found
