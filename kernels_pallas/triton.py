"""What the NVIDIA kernels share (Pallas, lowered through Triton): layouts, products, the decays of a chunk.

A program works on one head. What needs the state runs over the chunks in order, one block of V columns a
program; what does not runs for all chunks at once. Arrays stay [B,T,H,D]; scalars come as [B,H,T].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.arguments import backend
from kernels_pallas.chunks import chunk_segments, cumulative
from kernels_pallas.operands import output_types, pad_axis

CHUNK = 64
MAX_DIM = 256
COLUMNS = 64  # of V a sequential program holds


class Sizes(NamedTuple):
    """T is padded to whole chunks, K and V to powers of two."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int

    @property
    def N(self) -> int:
        return self.T // self.C

    @property
    def columns(self) -> int:
        return min(self.V, COLUMNS)

    def chunk(self, D: int) -> pl.BlockSpec:
        """[B,T,H,D] -> [C,D], programs (b, h, n)."""
        return pl.BlockSpec((None, self.C, None, D), lambda b, h, n: (b, n, h, 0))

    def chunk_scalars(self) -> pl.BlockSpec:
        """[B,H,T] -> [C], programs (b, h, n)."""
        return pl.BlockSpec((None, None, self.C), lambda b, h, n: (b, h, n))

    def chunk_state(self) -> pl.BlockSpec:
        """[B,N,H,K,V] -> [K,V], programs (b, h, n)."""
        return pl.BlockSpec((None, None, None, self.K, self.V), lambda b, h, n: (b, n, h, 0, 0))

    def sequence(self, D: int, columns: bool = False) -> pl.BlockSpec:
        """[B,T,H,D] -> [T,D] or [T, a block of columns], programs (b, h, block of columns)."""
        if columns:
            return pl.BlockSpec((None, self.T, None, self.columns), lambda b, h, c: (b, 0, h, c))
        return pl.BlockSpec((None, self.T, None, D), lambda b, h, c: (b, 0, h, 0))

    def sequence_scalars(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.T), lambda b, h, c: (b, h, 0))

    def state(self) -> pl.BlockSpec:
        """[B,H,K,V] -> [K, columns], programs (b, h, block of columns)."""
        return pl.BlockSpec((None, None, self.K, self.columns), lambda b, h, c: (b, h, 0, c))

    def states(self) -> pl.BlockSpec:
        """[B,N,H,K,V] -> [N, K, columns], programs (b, h, block of columns)."""
        return pl.BlockSpec((None, self.N, None, self.K, self.columns), lambda b, h, c: (b, 0, h, 0, c))

    def chunk_inputs(self, q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array, scalars: Sequence) -> list:
        """Padded q, k, v, further arrays like v, and scalars as inputs of `run`, programs (b, h, n)."""
        tokens = [(q, self.chunk(self.K)), (k, self.chunk(self.K)), *((x, self.chunk(self.V)) for x in (v, *more))]
        return tokens + [(x, self.chunk_scalars()) for x in scalars]

    def gradient_outputs(self, q: jax.Array, k: jax.Array, v: jax.Array, scalars: int) -> list:
        """The gradients of q, k, v and of `scalars` scalars per head as outputs of `run`, programs (b, h, n)."""
        sizes = ((q, self.K), (k, self.K), (v, self.V))
        tokens = [(self.tokens(D, x.dtype), self.chunk(D)) for x, D in sizes]
        return tokens + [(self.scalars(), self.chunk_scalars())] * scalars

    def tokens(self, D: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, D), dtype)

    def scalars(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.H, self.T), jnp.float32)


def sizes_of(op: str, q: jax.Array, v: jax.Array, chunk_size: int | None) -> Sizes:
    """The padded sizes of q [B,T,H,K] and v [B,T,H,V].

    Raises:
      ValueError: a head is larger than 256, or the chunk is not a power of two from 16 to 128.
    """
    B, T, H, K = q.shape
    C = chunk_size or CHUNK
    if C not in (16, 32, 64, 128):
        raise ValueError(f"{op}: the GPU kernels take chunk_size 16, 32, 64 or 128, got {C}")
    K, V = (max(16, 1 << (d - 1).bit_length()) for d in (K, v.shape[-1]))
    if max(K, V) > MAX_DIM:
        raise ValueError(f"{op}: the GPU kernels take heads up to {MAX_DIM}, got {K} and {V}; use implementation='xla'")
    return Sizes(B, -(-T // C) * C, H, K, V, C)


def pad_tokens(x: jax.Array, T: int, D: int) -> jax.Array:
    """[B,t,H,d] -> [B,T,H,D] with zeros."""
    return pad_axis(pad_axis(x, 1, T), 3, D)


def pad_state(state: jax.Array, s: Sizes) -> jax.Array:
    return pad_axis(pad_axis(state.astype(jnp.float32), 2, s.K), 3, s.V)


def run(kernel: Callable, name: str, grid: tuple[int, ...], inputs: Sequence, outputs: Sequence, num_warps: int = 4):
    """A Pallas call through Triton; interpreted where the program is not for a GPU. Arguments as `mosaic.run`'s."""
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    shapes = output_types(name, shapes, arrays, backend() != "gpu")
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=backend() != "gpu",
        name=name,
    )(*arrays)


def dot(a: jax.Array, b: jax.Array, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """A product that accumulates in float32; float32 operands are multiplied exactly."""
    exact = a.dtype == jnp.float32 or b.dtype == jnp.float32
    if exact:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision="highest" if exact else None)


class Decay(NamedTuple):
    """One head's decays in a chunk (see `chunks.py`): mask [C,C], reach [C], keep [C], total []."""

    mask: jax.Array
    reach: jax.Array
    keep: jax.Array
    total: jax.Array


def scalars_of(log_decay: jax.Array, segments: jax.Array | None, s: Sizes) -> list[jax.Array]:
    """Coarse and fine cumulative decays [B,H,T], each token's segment and the one carried into its chunk [B,H,T]."""
    g = pad_axis(log_decay.astype(jnp.float32), 1, s.C).transpose(0, 2, 1).reshape(s.B, s.H, s.N, s.C)
    parts = [x.reshape(s.B, s.H, s.T) for x in cumulative(g)]
    if segments is None:
        return [*parts, *[jnp.zeros_like(parts[0], jnp.int32)] * 2]
    chunks, carried = chunk_segments(segments, s.C)
    for x in (chunks, jnp.broadcast_to(carried[..., None], chunks.shape)):
        parts.append(jnp.broadcast_to(x.transpose(1, 0, 2).reshape(s.B, 1, s.T), (s.B, s.H, s.T)))
    return parts


def load_decay(coarse, fine, segment, carried, at) -> Decay:
    """The decays of the chunk at `at` (a slice of the references from `scalars_of`)."""
    c, f, seg, start = coarse[at], fine[at], segment[at], carried[at]
    C = c.shape[0]
    index = jnp.arange(C)

    def last(x):
        return jnp.sum(jnp.where(index == C - 1, x, 0), axis=0)

    inside = (index[:, None] >= index[None, :]) & (seg[:, None] == seg[None, :])
    mask = (c[:, None] - c[None, :]) + (f[:, None] - f[None, :])
    end = last(seg)
    total = jnp.where(end == last(start), jnp.exp(last(c) + last(f)), 0.0)
    return Decay(
        mask=jnp.where(inside, jnp.exp(jnp.where(inside, mask, 0.0)), 0.0),
        reach=jnp.where(seg == start, jnp.exp(c + f), 0.0),
        keep=jnp.where(seg == end, jnp.exp((last(c) - c) + (last(f) - f)), 0.0),
        total=total,
    )


def decay_gradient(da: jax.Array, s: Sizes, T: int) -> jax.Array:
    """Gradient of the log decays [B,T,H] from that of their cumulative sums inside chunks [B,H,T]."""
    da = jax.lax.cumsum(da.reshape(s.B, s.H, s.N, s.C), axis=3, reverse=True)
    return da.reshape(s.B, s.H, s.T).transpose(0, 2, 1)[:, :T]
