"""B'MOJO-F: one softmax over a window of tokens and a window of fading memory.

Query i attends to keys of x at i-W+1 … i and to keys of f = mixer(x) at i-2W+1 … i-W.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import PARAMETER_KEYS, ModelConfig
from hybrid_jax.layers.attention import CACHE_AXES, Attention, KVCache, attention_mask, empty_cache, extend_window
from hybrid_jax.layers.gdn import GatedDeltaNet
from hybrid_jax.layers.gka import GatedKalmaNet
from hybrid_jax.layers.linear import Linear, RMSNorm
from hybrid_jax.layers.mamba2 import Mamba2
from hybrid_jax.parallel.attention import attend_windows

SSM_MIXERS = {"gka": GatedKalmaNet, "gdn": GatedDeltaNet, "mamba2": Mamba2}


class BMojoState(NamedTuple):
    """The mixer's state and the caches of in-context and fading keys and values (2W - 1 tokens each)."""

    mixer: Any
    context: KVCache
    fading: KVCache


class BMojoAttention(Attention):
    """Attention's projections; untied, a second set (`q_proj_`, ...) serves the fading tokens."""

    def __init__(self, config: ModelConfig, *, rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.tied = config.bmojo.tie_attn_weights
        if self.tied:
            return
        hid, H, Hkv, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        kw = dict(bias=config.qkv_bias, std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.q_proj_ = Linear(hid, H * D, axes=("embed", "heads"), **kw)
        self.k_proj_ = Linear(hid, Hkv * D, axes=("embed", "kv_heads"), **kw)
        self.v_proj_ = Linear(hid, Hkv * D, axes=("embed", "kv_heads"), **kw)
        self.q_norm_ = RMSNorm(D, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm_ = RMSNorm(D, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None

    def project_fading(self, x, f, positions):
        """The query against fading tokens (from x), and their keys and values (from f)."""
        first = self if self.tied else _Second(self)
        q, _, _ = Attention.project(first, x, positions)
        _, k, v = Attention.project(first, f, positions)
        return q, k, v


@dataclasses.dataclass
class _Second:
    """The second set of projections under the first set's names."""

    attention: BMojoAttention

    def __getattr__(self, name):
        return getattr(self.attention, name if name == "config" else name + "_")


class BMojoF(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs, dtype=jnp.float32):
        kind = config.bmojo.ssm_mixer
        self.mixer_key = PARAMETER_KEYS[kind]
        setattr(self, self.mixer_key, SSM_MIXERS[kind](config, rngs=rngs, dtype=dtype))
        self.bmojo_attn = BMojoAttention(config, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(self, x, *, positions, segment_ids, state: BMojoState | None = None):
        """x [B,T,hidden] -> (y [B,T,hidden], state)."""
        c, W = self.config, self.config.bmojo.window_size
        B, T, _ = x.shape
        f, mixer_state = getattr(self, self.mixer_key)(x, positions=positions, segment_ids=segment_ids, state=state and state.mixer)
        q, k, v = self.bmojo_attn.project(x, positions)
        fading_q, fading_k, fading_v = self.bmojo_attn.project_fading(x, f, positions)
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

    def init_state(self, batch: int, max_length: int, dtype=jnp.float32) -> BMojoState:
        c = self.config
        cache = empty_cache(batch, 2 * c.bmojo.window_size - 1, c.num_kv_heads, c.head_dim, dtype)
        return BMojoState(getattr(self, self.mixer_key).init_state(batch, max_length, dtype), cache, cache)

    def state_axes(self) -> BMojoState:
        return BMojoState(getattr(self, self.mixer_key).state_axes(), CACHE_AXES, CACHE_AXES)
