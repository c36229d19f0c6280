"""B'MOJO-F: one softmax over a window of tokens and a window of fading memory.

Query i attends to keys of x at i-W+1 … i and to keys of f = mixer(x) at i-2W+1 … i-W.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax import layers
from hybrid_jax.config import BMojoConfig, ModelConfig
from hybrid_jax.layers.attention import (
    Attention,
    KVCache,
    attention_mask,
    cache_axes,
    empty_cache,
    extend_window,
    query_key_norms,
)
from hybrid_jax.layers.linear import Linear
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.mixers import KINDS
from hybrid_jax.parallel.attention import attend_windows


class BMojoState(NamedTuple):
    """The mixer's state and the caches of in-context and fading keys and values (2W - 1 tokens each)."""

    mixer: Any
    context: KVCache
    fading: KVCache


class BMojoAttention(Attention):
    """Attention's projections; untied, a second set (`q_proj_`, ...) serves the fading tokens."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        super().__init__(config, layer, rngs=rngs, dtype=dtype)
        self.tied = config.options(BMojoConfig).tie_attn_weights
        if self.tied:
            return
        hid, H, Hkv, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        kw: dict[str, Any] = dict(bias=config.qkv_bias, std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.q_proj_ = Linear(hid, H * D, axes=("embed", "heads"), **kw)
        self.k_proj_ = Linear(hid, Hkv * D, axes=("embed", "kv_heads"), **kw)
        self.v_proj_ = Linear(hid, Hkv * D, axes=("embed", "kv_heads"), **kw)
        self.q_norm_, self.k_norm_ = query_key_norms(config, dtype)

    @staticmethod
    def window_of(config: ModelConfig, layer: int) -> int | None:
        """Returns None: `BMojoF` has windows of its own."""
        return None

    def project_fading(
        self, x: jax.Array, f: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the queries against fading tokens, from x [B, T, hidden], and their keys and values, from f [B, T, hidden]."""
        suffix = "" if self.tied else "_"
        q, _, _ = self.project(x, positions, suffix, segment_ids=segment_ids)
        _, k, v = self.project(f, positions, suffix, segment_ids=segment_ids)
        return q, k, v


class BMojoF(nnx.Module):
    """B'MOJO-F. The project has it for compatibility with released checkpoints; no recipe uses it."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        kind = config.options(BMojoConfig).ssm_mixer
        self.mixer_key = KINDS[kind].parameter_key
        setattr(self, self.mixer_key, layers.make_mixer(kind, config, layer, rngs=rngs, dtype=dtype))
        self.bmojo_attn = BMojoAttention(config, layer, rngs=rngs, dtype=dtype)
        self.config = config

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns attention copied to `bmojo_attn`, to both sets if untied (`q_proj_`), and the mixer's own recipe."""
        kind = config.options(BMojoConfig).ssm_mixer
        prefix = KINDS[kind].parameter_key + "."
        mixer = {n.removeprefix(prefix): v for n, v in fresh.items() if n.startswith(prefix)}
        copied = {prefix + n: v for n, v in layers.MIXERS[kind].from_attention(source, mixer, config, layer).items()}
        for name in fresh:
            if name.startswith("bmojo_attn."):
                module, leaf = name.removeprefix("bmojo_attn.").split(".")
                copied[name] = source[f"{module.rstrip('_')}.{leaf}"]
        return copied

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: BMojoState | None = None
    ) -> tuple[jax.Array, BMojoState | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]."""
        c, W = self.config, self.config.options(BMojoConfig).window_size
        B, T, _ = x.shape
        f, mixer_state = getattr(self, self.mixer_key)(x, positions=positions, segment_ids=segment_ids, state=state and state.mixer)
        q, k, v = self.bmojo_attn.project(x, positions, segment_ids=segment_ids)
        fading_q, fading_k, fading_v = self.bmojo_attn.project_fading(x, f, positions, segment_ids)
        if state is None:
            sets = ((q, fading_q), (k, fading_k), (v, fading_v), ((0, W), (W, 2 * W)))
            o = attend_windows(*sets, segment_ids)
            return self.bmojo_attn.o_proj(o.reshape(B, T, -1)), None
        zero = jnp.zeros((), jnp.int32)
        context, kept_context = extend_window(state.context, KVCache(k, v, positions, segment_ids, zero))
        fading, kept_fading = extend_window(state.fading, KVCache(fading_k, fading_v, positions, segment_ids, zero))
        kept = BMojoState(mixer_state, kept_context, kept_fading)
        groups = (B, T, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)

        def scores(q, keys: KVCache, nearest):
            s = jnp.einsum("bthgd,bshd->bhgts", q.reshape(groups), keys.k, preferred_element_type=jnp.float32)
            seen = attention_mask(positions, segment_ids, keys.positions, keys.segment_ids, W, nearest)
            return jnp.where(seen[:, None, None], s * c.head_dim**-0.5, -jnp.inf)

        both = jnp.concatenate([scores(q, context, 0), scores(fading_q, fading, W)], axis=-1)
        weights = jax.nn.softmax(both, axis=-1).astype(x.dtype)
        values = jnp.concatenate([context.v, fading.v], axis=1)
        o = jnp.einsum("bhgts,bshd->bthgd", weights, values).reshape(B, T, -1)
        return self.bmojo_attn.o_proj(o), kept

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> BMojoState:
        c = self.config
        length = min(2 * c.options(BMojoConfig).window_size - 1, max_length)
        cache = empty_cache(batch, length, c.num_kv_heads, c.head_dim, dtype)
        return BMojoState(getattr(self, self.mixer_key).init_state(batch, max_length, dtype), cache, cache)

    def state_axes(self) -> BMojoState:
        return BMojoState(getattr(self, self.mixer_key).state_axes(), cache_axes(), cache_axes())
