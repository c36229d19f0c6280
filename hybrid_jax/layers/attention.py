"""Causal attention with grouped keys, rotary positions, optional qk-norm and sliding window.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j,   j <= i, same segment (or chunk of it), i - j < window
    y = o_proj(o), or o_proj(o * sigmoid(g_proj x)) with an output gate

The cache of a full layer holds `max_length` tokens, that of a windowed layer window - 1 at most.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import ModelConfig, SWAConfig
from hybrid_jax.layers.linear import LayerNorm, Linear, RMSNorm, norm_heads, source_norm
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, of_softmax
from hybrid_jax.layers.rope import cos_sin, document_frequencies, rotate
from hybrid_jax.parallel.attention import attend
from hybrid_jax.parallel.attention_block import soft_capped
from hybrid_jax.parallel.norms import normed_and_rotated
from kernels_pallas.numerics import rms_normalize


class KVCache(NamedTuple):
    """Keys and values [B, S, Hkv, D] seen so far, their positions and segments [B, S] (segment -1: empty
    slot) and the next slot to write (a windowed cache shifts instead: newest token last)."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    next_slot: jax.Array


def cache_axes(kv_heads: str | None = "kv_heads") -> KVCache:
    """Returns the logical axes of each array of a cache; `kv_heads` is the axis of its heads."""
    heads, slots = ("batch", None, kv_heads, None), ("batch", None)
    return KVCache._make([heads, heads, slots, slots, ()])


def attention_mask(
    q_positions: jax.Array,  # [B, T]
    q_segments: jax.Array,  # [B, T]
    k_positions: jax.Array,  # [B, S]
    k_segments: jax.Array,  # [B, S]
    window: int | None = None,
    nearest: int = 0,
) -> jax.Array:
    """Returns [B, T, S], True where a query may see a key: same segment, and 0 <= distance - nearest < window."""
    distance = q_positions[:, :, None] - k_positions[:, None, :] - nearest
    mask = (distance >= 0) & (q_segments[:, :, None] == k_segments[:, None, :])
    return mask if window is None else mask & (distance < window)


def chunk_ids(segment_ids: jax.Array, positions: jax.Array, chunk: int | None) -> jax.Array:
    """Returns ids [B, T] in place of those of segments, by which a window of at most `chunk` keys ends where its chunk begins.

    Chunks that follow each other in a document get different ids; a window meets no others. Padding and empty slots keep theirs.

    Args:
      segment_ids, positions: [B, T]; a chunk has the positions p of equal floor(p / chunk) in a document.
      chunk: tokens of a chunk; None: the ids stay as they are.
    """
    return segment_ids if chunk is None else jnp.where(segment_ids > 0, 2 * segment_ids + positions // chunk % 2, segment_ids)


def empty_cache(batch: int, length: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """Returns a cache of `length` empty slots."""
    zeros = jnp.zeros((batch, length, kv_heads, head_dim), dtype)
    slots = jnp.zeros((batch, length), jnp.int32)
    return KVCache(zeros, zeros, slots, slots - 1, jnp.zeros((), jnp.int32))


def extend_window(cache: KVCache, new: KVCache) -> tuple[KVCache, KVCache]:
    """Adds tokens to a windowed cache; returns what the new queries may see, and the cache afterwards."""
    both = (jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip(cache[:4], new[:4], strict=True))
    seen = KVCache._make([*both, cache.next_slot])
    length = cache.k.shape[1]
    kept = KVCache._make([*(a[:, a.shape[1] - length :] for a in seen[:4]), cache.next_slot + new.k.shape[1]])
    return seen, kept


def extend_full(cache: KVCache, new: KVCache) -> KVCache:
    """Returns a full cache with the new tokens written at `next_slot`."""
    written = (
        jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), cache.next_slot, axis=1)
        for a, b in zip(cache[:4], new[:4], strict=True)
    )
    return KVCache._make([*written, cache.next_slot + new.k.shape[1]])


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float | None = None) -> jax.Array:
    """Returns the attention [B, T, H, D] of queries to the keys and values [B, S, Hkv, D] of a cache.

    Args:
      mask: [B, T, S], which keys a query sees.
      soft_cap: of the scores; None: there is none.
    """
    if soft_cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    B, T, H, D = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, D)
    scores = jnp.einsum("bthgd,bshd->bhgts", grouped, k, preferred_element_type=jnp.float32) * D**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], soft_capped(scores, soft_cap), jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhgts,bshd->bthgd", weights.astype(v.dtype), v).reshape(B, T, H, D)


def kv_heads_of(heads: Sequence[int], config: ModelConfig) -> list[int]:
    """Returns the key-value heads of these query heads, each once, in rising order."""
    return sorted({h * config.num_kv_heads // config.num_heads for h in heads})


def query_key_norms(config: ModelConfig, dtype: DTypeLike) -> tuple[RMSNorm | LayerNorm | None, RMSNorm | LayerNorm | None]:
    """Returns the norms of queries and of keys, as wide as a head or as all heads together; None: the source has none."""
    if not config.qk_norm:
        return None, None
    heads = (config.num_heads, config.num_kv_heads) if config.qk_norm_all_heads else (1, 1)
    q_norm, k_norm = (source_norm(config, n * config.head_dim, dtype) for n in heads)
    return q_norm, k_norm


def _weights_of_heads(
    q_norm: RMSNorm | LayerNorm | None, k_norm: RMSNorm | LayerNorm | None, head_dim: int
) -> tuple[jax.Array | None, jax.Array | None] | None:
    """Returns the weights [head_dim] of RMS norms of each head, None for no norm; None alone: norms of another kind."""
    if q_norm is None or k_norm is None:
        return None, None
    norms = [norm for norm in (q_norm, k_norm) if isinstance(norm, RMSNorm) and norm.weight.shape == (head_dim,)]
    return (norms[0].scale(), norms[1].scale()) if len(norms) == 2 else None


def _scaled(q: jax.Array, positions: jax.Array, strength: float, context: int) -> jax.Array:
    """Returns queries [B, T, H, D] times 1 + strength * log(1 + floor(position / context)), for positions [B, T]."""
    scale = 1 + strength * jnp.log1p(jnp.floor(positions / context))
    return (q.astype(jnp.float32) * scale[..., None, None]).astype(q.dtype)


class Attention(nnx.Module):
    """Multi-head attention with the source family's options; `window` is how many keys a query sees, itself included.

    Args:
      heads: the query heads that there are, by their numbers in the source and in rising order; None: all. With some heads
        only their key-value heads exist, also in the cache. Some heads may not divide into the shards of `tensor`, so they
        are replicated over it.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        heads: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        hid, D = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads, self.kv_of_head = config.num_heads, config.num_kv_heads, None
        self.head_axis, self.kv_axis = "heads", "kv_heads"
        if heads is not None:
            kv_heads = kv_heads_of(heads, config)
            found = tuple(kv_heads.index(h * config.num_kv_heads // config.num_heads) for h in heads)
            self.num_heads, self.num_kv_heads, self.head_axis, self.kv_axis = len(heads), len(kv_heads), None, None
            self.kv_of_head = None if len({found.count(h) for h in found}) == 1 else found
        H, Hkv = self.num_heads, self.num_kv_heads
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.q_proj = linear(hid, H * D, bias=config.qkv_bias, axes=("embed", self.head_axis))
        self.k_proj = linear(hid, Hkv * D, bias=config.qkv_bias, axes=("embed", self.kv_axis))
        self.v_proj = linear(hid, Hkv * D, bias=config.qkv_bias, axes=("embed", self.kv_axis))
        self.o_proj = linear(H * D, hid, bias=config.o_bias, axes=(self.head_axis, "embed"))
        gate_proj = functools.partial(linear, hid, H * D, bias=config.qkv_bias, axes=("embed", self.head_axis))
        self.g_proj = gate_proj() if config.attention_gate else None
        self.q_norm, self.k_norm = query_key_norms(config, dtype)
        self.config, self.window, self.rope = config, self.window_of(config, layer), config.rope_of(layer)
        self.chunk = config.chunk_of(layer)

    @staticmethod
    def window_of(config: ModelConfig, layer: int) -> int | None:
        """Returns how many keys a query sees, itself included; None for all. Here: the source's own window."""
        return config.attention_windows[layer]

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns all parameters: they are copied."""
        return {name: source[name] for name in fresh}

    def project(
        self, x: jax.Array, positions: jax.Array, suffix: str = "", *, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns q [B, T, H, D] and k, v [B, T, Hkv, D], normed and rotated, of the projections whose names end with `suffix`.

        LongRoPE needs the segment ids [B, T] of rows longer than its original context.
        """
        q_proj, k_proj, v_proj, q_norm, k_norm = (
            getattr(self, name + suffix) for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
        )
        c = self.config
        B, T, _ = x.shape
        q = q_proj(x).reshape(B, T, self.num_heads, c.head_dim)
        k = k_proj(x).reshape(B, T, self.num_kv_heads, c.head_dim)
        v = v_proj(x).reshape(B, T, self.num_kv_heads, c.head_dim)
        if self.rope is None:
            q, k = norm_heads(q_norm, q), norm_heads(k_norm, k)
            if c.unrotated_query_scaling is not None:
                q = _scaled(q, positions + 1, *c.unrotated_query_scaling)
        else:
            angles = document_frequencies(self.rope, c.head_dim, c.max_position_embeddings, positions, segment_ids)
            cos, sin = cos_sin(positions, *angles)
            weights = _weights_of_heads(q_norm, k_norm, c.head_dim)
            if weights is not None and c.rotate_halves:
                axes = (self.head_axis, self.kv_axis)
                q, k = normed_and_rotated(q, k, *weights, cos, sin, c.rms_norm_eps, axes=axes)
            else:
                q, k = norm_heads(q_norm, q), norm_heads(k_norm, k)
                q, k = (rotate(x, cos, sin, halves=c.rotate_halves) for x in (q, k))
            if c.qk_norm_rotated:
                q, k = (rms_normalize(x, None, c.rms_norm_eps) for x in (q, k))
        if c.query_pre_attn_scalar is not None:
            q = q * jnp.asarray((c.head_dim / c.query_pre_attn_scalar) ** 0.5, q.dtype)
        if c.query_scaling is not None:
            q = _scaled(q, positions, *c.query_scaling)
        return q, k, v

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]. With a state, its tokens come before x."""
        q, k, v = self.project(x, positions, segment_ids=segment_ids)
        ids = chunk_ids(segment_ids, positions, self.chunk)
        if state is None:
            k, v = self._for_heads(k), self._for_heads(v)
            o = attend(q, k, v, ids, self.window, soft_cap=self.config.attention_soft_cap, head_axis=self.head_axis)
            return self.output(o, x), None
        seen = KVCache(k, v, positions, segment_ids, jnp.zeros((), jnp.int32))
        if self.window is not None:
            seen, state = extend_window(state, seen)
        else:
            seen = state = extend_full(state, seen)
        seen_ids = chunk_ids(seen.segment_ids, seen.positions, self.chunk)
        mask = attention_mask(positions, ids, seen.positions, seen_ids, self.window)
        k, v = (self._for_heads(x).astype(q.dtype) for x in (seen.k, seen.v))
        o = cached_attention(q, k, v, mask, self.config.attention_soft_cap)
        return self.output(o, x), state

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """Returns y [B, T, hidden] of the heads' outputs o [B, T, H, D], times the gate of x [B, T, hidden] if any."""
        o = o.reshape(*x.shape[:2], -1)
        return self.o_proj(o if self.g_proj is None else o * jax.nn.sigmoid(self.g_proj(x)))

    def _for_heads(self, x: jax.Array) -> jax.Array:
        """Returns keys or values [B, S, Hkv, D], repeated for each query head if not all of the Hkv have equally many."""
        return x if self.kv_of_head is None else x[:, :, jnp.array(self.kv_of_head)]

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the softmax of every query head on x [B, T, hidden]."""
        q, k, v = self.project(x, positions, segment_ids=segment_ids)
        ids = chunk_ids(segment_ids, positions, self.chunk)
        mask = functools.partial(attention_mask, k_positions=positions, k_segments=ids, window=self.window)
        return of_softmax(q, self._for_heads(k), self._for_heads(v), positions, ids, mask, self.config.attention_soft_cap)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        length = max_length if self.window is None else min(self.window - 1, max_length)
        return empty_cache(batch, length, self.num_kv_heads, self.config.head_dim, dtype)

    def state_axes(self) -> KVCache:
        return cache_axes(self.kv_axis)


class SlidingWindowAttention(Attention):
    """Attention whose queries see the last `swa_config.window_size` keys, or fewer where the source's own window is shorter."""

    @staticmethod
    def window_of(config: ModelConfig, layer: int) -> int | None:
        """Returns the window of the options, or the layer's own if that is shorter: its weights know no key beyond it."""
        own, window = config.attention_windows[layer], config.options(SWAConfig).window_size
        return window if own is None else min(own, window)
