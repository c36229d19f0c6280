"""What the NVIDIA kernels share (Pallas, lowered through Triton): layouts, products, the decays of a chunk.

A program works on one head. What needs the state runs over the chunks in order, one block of V columns a
program; what does not runs for all chunks at once. Arrays stay [B,T,H,D]; scalars come as [B,H,T].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from kernels_pallas.arguments import backend
from kernels_pallas.chunks import chunk_segments, cumulative
from kernels_pallas.operands import output_types, pad_axis

CHUNK = 64
MAX_DIM = 256
COLUMNS = 64  # of V, that one sequential program holds

Input = tuple[jax.Array, pl.BlockSpec]
Output = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


class Sizes(NamedTuple):
    """The sizes of an operation: T padded to a multiple of the chunk C, K and V to powers of two."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int

    @property
    def N(self) -> int:
        """The number of chunks."""
        return self.T // self.C

    @property
    def columns(self) -> int:
        """The columns of V that one sequential program holds."""
        return min(self.V, COLUMNS)

    def chunk(self, D: int) -> pl.BlockSpec:
        """Returns the blocks [C,D] of [B,T,H,D], programs (b, h, n)."""
        return pl.BlockSpec((None, self.C, None, D), lambda b, h, n: (b, n, h, 0))

    def chunk_scalars(self) -> pl.BlockSpec:
        """Returns the blocks [C] of [B,H,T], programs (b, h, n)."""
        return pl.BlockSpec((None, None, self.C), lambda b, h, n: (b, h, n))

    def chunk_state(self) -> pl.BlockSpec:
        """Returns the blocks [K,V] of [B,N,H,K,V], programs (b, h, n)."""
        return pl.BlockSpec((None, None, None, self.K, self.V), lambda b, h, n: (b, n, h, 0, 0))

    def sequence(self, D: int, columns: bool = False) -> pl.BlockSpec:
        """Returns the blocks [T,D], or [T, columns], of [B,T,H,D], programs (b, h, block of columns)."""
        if columns:
            return pl.BlockSpec((None, self.T, None, self.columns), lambda b, h, c: (b, 0, h, c))
        return pl.BlockSpec((None, self.T, None, D), lambda b, h, c: (b, 0, h, 0))

    def sequence_scalars(self) -> pl.BlockSpec:
        """Returns the blocks [T] of [B,H,T], programs (b, h, block of columns)."""
        return pl.BlockSpec((None, None, self.T), lambda b, h, c: (b, h, 0))

    def state(self) -> pl.BlockSpec:
        """Returns the blocks [K, columns] of [B,H,K,V], programs (b, h, block of columns)."""
        return pl.BlockSpec((None, None, self.K, self.columns), lambda b, h, c: (b, h, 0, c))

    def states(self) -> pl.BlockSpec:
        """Returns the blocks [N, K, columns] of [B,N,H,K,V], programs (b, h, block of columns)."""
        return pl.BlockSpec((None, self.N, None, self.K, self.columns), lambda b, h, c: (b, 0, h, 0, c))

    def chunk_inputs(self, q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array, scalars: Sequence[jax.Array]) -> list[Input]:
        """Returns padded q, k, v, further arrays of v's shape, and scalars as inputs of `run`, programs (b, h, n)."""
        tokens = [(q, self.chunk(self.K)), (k, self.chunk(self.K)), *((x, self.chunk(self.V)) for x in (v, *more))]
        return tokens + [(x, self.chunk_scalars()) for x in scalars]

    def gradient_outputs(self, q: jax.Array, k: jax.Array, v: jax.Array, scalars: int) -> list[Output]:
        """Returns the gradients of q, k, v and of `scalars` numbers per head and token, as outputs of `run`, programs (b, h, n)."""
        sizes = ((q, self.K), (k, self.K), (v, self.V))
        tokens = [(self.tokens(D, x.dtype), self.chunk(D)) for x, D in sizes]
        return tokens + [(self.scalars(), self.chunk_scalars())] * scalars

    def tokens(self, D: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Returns an output [B,T,H,D]."""
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, D), dtype)

    def scalars(self) -> jax.ShapeDtypeStruct:
        """Returns an output [B,H,T] in float32."""
        return jax.ShapeDtypeStruct((self.B, self.H, self.T), jnp.float32)


def sizes_of(op: str, q: jax.Array, v: jax.Array, chunk_size: int | None) -> Sizes:
    """Returns the padded sizes of q [B,T,H,K] and v [B,T,H,V].

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
    """Returns x [B,t,H,d] as [B,T,H,D], padded with zeros to multiples of T and D."""
    return pad_axis(pad_axis(x, 1, T), 3, D)


def pad_state(state: jax.Array, s: Sizes) -> jax.Array:
    """Returns a state [B,H,k,v] as [B,H,K,V] in float32, padded with zeros."""
    return pad_axis(pad_axis(state.astype(jnp.float32), 2, s.K), 3, s.V)


def run(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    num_warps: int = 4,
) -> Sequence[jax.Array]:
    """Runs a kernel through Triton, interpreted where the program is not for a GPU.

    Args:
      kernel: takes references to a block of every input and every output, in this order.
      name: of the kernel, in profiles.
      grid: numbers of programs, e.g. (B, H, N).
      inputs: arrays and their blocks.
      outputs: shapes and their blocks.
      num_warps: of a program.

    Returns:
      The outputs.

    Raises:
      ValueError: see `operands.output_types`.
    """
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
    """Returns a product accumulated in float32; float32 operands are multiplied at full precision."""
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
    """Returns four [B,H,T]: coarse and fine cumulative decays, each token's segment and the one carried into its chunk."""
    g = pad_axis(log_decay.astype(jnp.float32), 1, s.C).transpose(0, 2, 1).reshape(s.B, s.H, s.N, s.C)
    parts = [x.reshape(s.B, s.H, s.T) for x in cumulative(g)]
    if segments is None:
        return [*parts, *[jnp.zeros_like(parts[0], jnp.int32)] * 2]
    chunks, carried = chunk_segments(segments, s.C)
    for x in (chunks, jnp.broadcast_to(carried[..., None], chunks.shape)):
        parts.append(jnp.broadcast_to(x.transpose(1, 0, 2).reshape(s.B, 1, s.T), (s.B, s.H, s.T)))
    return parts


def load_decay(coarse: jax.Ref, fine: jax.Ref, segment: jax.Ref, carried: jax.Ref, at: Any) -> Decay:
    """Reads the decays of the chunk at `at`, a slice of the four references [T] or [C] to `scalars_of`."""
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
    """Returns the gradient of the log decays [B,T,H], given that of their cumulative sums inside chunks [B,H,T]."""
    da = jax.lax.cumsum(da.reshape(s.B, s.H, s.N, s.C), axis=3, reverse=True)
    return da.reshape(s.B, s.H, s.T).transpose(0, 2, 1)[:, :T]
