"""A recurrent mixer beside some heads of attention, in one layer (retrieval-aware distillation, arXiv 2602.11374)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax import layers
from hybrid_jax.config import HeadHybridConfig, ModelConfig
from hybrid_jax.layers.attention import Attention, KVCache, kv_heads_of
from hybrid_jax.layers.linear import Linear
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, side_by_side
from hybrid_jax.mixers import KINDS
from kernels_pallas.numerics import safe_sqrt

STANDARDIZED_EPS = 1e-5  # of the published merge


class HeadHybridState(NamedTuple):
    """The recurrent mixer's state, and the cache of the kept heads' keys and values."""

    recurrent: Any
    attention: KVCache


class HeadHybrid(nnx.Module):
    """The layer's recurrent mixer with all its heads (`recurrent`), the kept heads of attention (`attention`) and how their
    outputs are merged (`HeadHybridConfig`). Both read the same normed input.

    The published layer gives each kept head keys and values of its own; here kept heads that shared a key-value head in the
    source still share it, in the parameters and in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        spec, hidden = config.layers[layer], config.hidden_size
        self.recurrent: Any = layers.MIXERS[spec.kind](config, layer, rngs=rngs, dtype=dtype)
        self.attention = Attention(config, layer, heads=spec.attention_heads, rngs=rngs, dtype=dtype)
        standardized, std = config.options(HeadHybridConfig).merge == "standardized", config.initializer_range
        linear = functools.partial(Linear, bias=True, axes=("embed", None), std=std, rngs=rngs, dtype=dtype)
        self.merge = linear(hidden, hidden) if standardized else None

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: HeadHybridState | None = None
    ) -> tuple[jax.Array, HeadHybridState | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]."""
        at = dict(positions=positions, segment_ids=segment_ids)
        y, recurrent = self.recurrent(x, state=state and state.recurrent, **at)
        kept, cache = self.attention(x, state=state and state.attention, **at)
        after = None if cache is None else HeadHybridState(recurrent, cache)
        if self.merge is None:
            return y + kept, after
        return (y + self.merge(_with_moments_of(kept, y))) / 2, after

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden] of all heads of the recurrent mixer, then of the kept heads."""
        at = dict(positions=positions, segment_ids=segment_ids)
        recurrent: Any = self.recurrent  # every recurrent mixer has the method
        return side_by_side(recurrent.mixing(x, **at), self.attention.mixing(x, **at))

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns the recurrent mixer's own recipe, and the kept heads' slices of attention.

        A bias of attention's output projection goes to the kept heads. `standardized`: the linear map begins as the identity (the
        paper does not state its own beginning). `sum`: the rows of the recurrent output projection that belong to kept heads
        begin at 0, because attention computes those heads.
        """
        spec, D = config.layers[layer], config.head_dim
        heads, kv_heads = spec.attention_heads, kv_heads_of(spec.attention_heads, config)
        own = {n.removeprefix("recurrent."): x for n, x in fresh.items() if n.startswith("recurrent.")}
        recurrent = layers.MIXERS[spec.kind].from_attention(source, own, config, layer)
        if (bias := f"{KINDS[spec.kind].output}.bias") in recurrent:
            recurrent[bias] = jnp.zeros_like(recurrent[bias])
        if "merge.kernel" in fresh:
            merge = {"merge.kernel": jnp.eye(config.hidden_size), "merge.bias": jnp.zeros_like(fresh["merge.bias"])}
        else:
            merge, output = {}, f"{KINDS[spec.kind].output}.kernel"
            recurrent[output] = recurrent[output].at[_channels(heads, D)].set(0)

        def kept(name: str, x: jax.Array) -> jax.Array:
            module, leaf = name.split(".")
            if module == "o_proj":
                return x[_channels(heads, D)] if leaf == "kernel" else x
            if module.endswith("_norm"):
                return x
            return x[..., _channels(heads if module in ("q_proj", "g_proj") else kv_heads, D)]

        names = [n.removeprefix("attention.") for n in fresh if n.startswith("attention.")]
        attention = {f"attention.{name}": kept(name, source[name]) for name in names}
        return {f"recurrent.{name}": x for name, x in recurrent.items()} | attention | merge

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> HeadHybridState:
        return HeadHybridState(*(mixer.init_state(batch, max_length, dtype) for mixer in (self.recurrent, self.attention)))

    def state_axes(self) -> HeadHybridState:
        return HeadHybridState(self.recurrent.state_axes(), self.attention.state_axes())


def _channels(heads: tuple[int, ...] | list[int], head_dim: int) -> jax.Array:
    """Returns the channels of these heads among those of all heads side by side."""
    return (jnp.array(heads)[:, None] * head_dim + jnp.arange(head_dim)).reshape(-1)


def _with_moments_of(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x, standardized over its last axis and given the mean and standard deviation of y; in x's dtype."""
    a, b = x.astype(jnp.float32), y.astype(jnp.float32)
    a = a - jnp.mean(a, axis=-1, keepdims=True)
    a = a * jax.lax.rsqrt(jnp.mean(a * a, axis=-1, keepdims=True) + STANDARDIZED_EPS)
    mean = jnp.mean(b, axis=-1, keepdims=True)
    deviation = safe_sqrt(jnp.mean((b - mean) ** 2, axis=-1, keepdims=True))
    return (a * deviation + mean).astype(x.dtype)
