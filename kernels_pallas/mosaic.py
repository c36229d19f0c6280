"""How the TPU kernels are called: the grid, the blocks of tokens, states and scalars, and the arrays around a kernel.

A grid step takes one chunk of C tokens of several heads. Arrays come as [B, T, H*D], so that a head is a
slice of complete lanes; the scalars of a chunk come as rows [R, C]. `mosaic_chunk.py` has what kernels do with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import operands
from kernels_pallas.arguments import backend
from kernels_pallas.chunks import chunk_segments, cumulative
from kernels_pallas.heads import repeat_heads
from kernels_pallas.operands import pad_axis

LANES = 128
VMEM_LIMIT = 48 << 20


class Grid(NamedTuple):
    """How one operation is divided into grid steps: B x (H / heads) x (T / C), time innermost and in order.

    K and V are multiples of 128 (or 64, see `lanes_of`), T is a multiple of C. `reverse` visits the chunks from the last to
    the first.
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int
    heads: int
    reverse: bool = False

    @property
    def N(self) -> int:
        """The number of chunks."""
        return self.T // self.C

    def chunk(self, n: Any) -> Any:
        """Returns the chunk that the n-th grid step along the tokens has."""
        return self.N - 1 - n if self.reverse else n

    def tokens(self, D: int, group: int = 1) -> pl.BlockSpec:
        """Returns the blocks [1, C, heads/group*D] of [B, T, H/group*D], where `group` heads share one."""
        return pl.BlockSpec((1, self.C, self.heads // group * D), lambda b, h, n: (b, self.chunk(n), h))

    def rows(self, R: int) -> pl.BlockSpec:
        """Returns the blocks [1, 1, 1, R, C] of [B, H/heads, N, R, C]."""
        return pl.BlockSpec((1, 1, 1, R, self.C), lambda b, h, n: (b, h, self.chunk(n), 0, 0))

    def state(self, K: int, V: int) -> pl.BlockSpec:
        """Returns the blocks [1, heads, K, V] of [B, H, K, V], the same for every chunk."""
        return pl.BlockSpec((1, self.heads, K, V), lambda b, h, n: (b, h, 0, 0))

    def states(self, K: int, V: int) -> pl.BlockSpec:
        """Returns the blocks [1, 1, heads, K, V] of [B, N, H, K, V]: one state per chunk."""
        return pl.BlockSpec((1, 1, self.heads, K, V), lambda b, h, n: (b, self.chunk(n), h, 0, 0))

    def tokens_shape(self, D: int, dtype: DTypeLike, group: int = 1) -> jax.ShapeDtypeStruct:
        """Returns the array of the blocks `tokens`."""
        return jax.ShapeDtypeStruct((self.B, self.T, self.H // group * D), dtype)

    def rows_shape(self, R: int) -> jax.ShapeDtypeStruct:
        """Returns the array of the blocks `rows`."""
        return jax.ShapeDtypeStruct((self.B, self.H // self.heads, self.N, R, self.C), jnp.float32)

    def state_shape(self, K: int, V: int) -> jax.ShapeDtypeStruct:
        """Returns the array of the blocks `state`."""
        return jax.ShapeDtypeStruct((self.B, self.H, K, V), jnp.float32)

    def states_shape(self, K: int, V: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Returns the array of the blocks `states`."""
        return jax.ShapeDtypeStruct((self.B, self.N, self.H, K, V), dtype)


Groups = tuple[int, int]  # how many heads share a head of k, and one of v
Input = tuple[jax.Array, pl.BlockSpec]
Output = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


def run(
    kernel: Callable[..., None],
    grid: Grid,
    name: str,
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    scratch: Sequence[Any],
) -> Sequence[jax.Array]:
    """Runs a kernel, interpreted where the program is not for a TPU.

    Args:
      kernel: takes references to a block of every input, every output and every scratch buffer, in this order.
      name: of the kernel, in profiles and in the laboratory.
      inputs: arrays and their blocks.
      outputs: shapes and their blocks.
      scratch: buffers that a core keeps from one grid step to the next, e.g. `pltpu.VMEM((C, K), jnp.float32)`.

    Returns:
      The outputs.

    Raises:
      ValueError: see `operands.output_types`.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    shapes = operands.output_types(name, shapes, arrays, backend() != "tpu")
    bytes_accessed = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
    steps = (grid.B, grid.H // grid.heads, grid.N)
    return pl.pallas_call(
        kernel,
        grid=steps,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=bytes_accessed, transcendentals=0),
        interpret=backend() != "tpu",
        metadata={"grid_steps": str(math.prod(steps)), "token_heads": str(grid.B * grid.T * grid.H)},
        name=name,
    )(*arrays)


def heads_per_step(H: int, limit: int, K: int, V: int, dtype: DTypeLike, groups: Groups = (1, 1)) -> int:
    """Returns the largest divisor of H that fills its registers, up to `limit` heads of 128 dims in bf16 or fewer larger ones.

    With groups, the keys and values of a step fill registers too; 0: no divisor has complete groups.
    """
    limit = max(2, limit * LANES * 2 // (max(K, V, LANES) * jnp.dtype(dtype).itemsize))
    fits = [
        n
        for n in range(1, min(H, limit) + 1)
        if H % n == 0 and all(n % g == 0 and n // g * D % LANES == 0 for g, D in zip(groups, (K, V), strict=True))
    ]
    return max(fits, default=0)


def lanes_of(D: int, H: int) -> int:
    """Returns what D dims of a head are padded to: a multiple of 128 lanes, or 64 if two heads share a register."""
    return D if D == LANES // 2 and H % 2 == 0 else -(-D // LANES) * LANES


def lanes_per_step(D: int, limit: int, multiple: int = LANES) -> int:
    """Returns how many of D channels a grid step has: the largest divisor of D up to `limit` that is a multiple of `multiple`."""
    return next(n for n in range(min(limit, D), 0, -multiple) if D % n == 0)


def grid_of(q: jax.Array, v: jax.Array, heads: int, reverse: bool = False, groups: Groups = (1, 1)) -> Grid:
    """Returns the grid of q [B,T,H,K] and v [B,T,Hv,V], with at most `heads` heads per step and chunks of 128 tokens."""
    B, T, H, K = q.shape
    K, V = lanes_of(K, H), lanes_of(v.shape[-1], H)
    return Grid(B, -(-T // LANES) * LANES, H, K, V, LANES, heads_per_step(H, heads, K, V, q.dtype, groups), reverse)


def groups_of(q: jax.Array, k: jax.Array, v: jax.Array) -> Groups:
    """Returns how many heads of q share a head of k [B,T,Hk,K], and one of v [B,T,Hv,V]."""
    return q.shape[2] // k.shape[2], q.shape[2] // v.shape[2]


def complete_groups(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Returns k and v, repeated to q's heads where a grid step of at most `heads` heads would not have complete groups.

    A step of fewer heads overlaps less, so half as many as without groups are the least.
    """
    groups = groups_of(q, k, v)
    with_groups, without = (grid_of(q, v, heads, groups=g).heads for g in (groups, (1, 1)))
    if 2 * with_groups > without:
        return k, v
    return repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])


def row_count(n: int) -> int:
    """Returns n, rounded up to the 8 rows of a register."""
    return -(-n // 8) * 8


def flat_tokens(x: jax.Array, C: int) -> jax.Array:
    """Returns x [B,T,H,D] as [B,T',H*D'], D padded as `lanes_of` says and T to a multiple of the chunk."""
    x = pad_axis(pad_axis(x, 3, lanes_of(x.shape[3], x.shape[2])), 1, C)
    return x.reshape(*x.shape[:2], -1)


def head_tokens(x: jax.Array, T: int, H: int, D: int) -> jax.Array:
    """Returns x [B,T',H*D'] as [B,T,H,D]: the inverse of `flat_tokens`."""
    return x.reshape(*x.shape[:2], H, -1)[:, :T, :, :D]


def pad_state(state: jax.Array) -> jax.Array:
    """Returns a state [B,H,K,V] in float32, K and V padded as `lanes_of` says."""
    _, H, K, V = state.shape
    return pad_axis(pad_axis(state.astype(jnp.float32), 2, lanes_of(K, H)), 3, lanes_of(V, H))


def token_inputs(grid: Grid, q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array) -> list[Input]:
    """Returns q, k, v [B,T,H,*], k and v also of fewer heads, and `chunk_rows` as inputs of `run`."""
    of_k, of_v = groups_of(q, k, v)
    return [
        (flat_tokens(q, grid.C), grid.tokens(grid.K)),
        (flat_tokens(k, grid.C), grid.tokens(grid.K, of_k)),
        (flat_tokens(v, grid.C), grid.tokens(grid.V, of_v)),
        (rows, grid.rows(rows.shape[3])),
    ]


def gradient_outputs(grid: Grid, q: jax.Array, k: jax.Array, v: jax.Array, scalars: int) -> list[Output]:
    """Returns the gradients of q, k, v and of `scalars` numbers per head and token, as outputs of `run`."""
    R, (of_k, of_v) = row_count(scalars * grid.heads), groups_of(q, k, v)
    return [
        (grid.tokens_shape(grid.K, q.dtype), grid.tokens(grid.K)),
        (grid.tokens_shape(grid.K, k.dtype, of_k), grid.tokens(grid.K, of_k)),
        (grid.tokens_shape(grid.V, v.dtype, of_v), grid.tokens(grid.V, of_v)),
        (grid.rows_shape(R), grid.rows(R)),
    ]


def token_gradients(dq: jax.Array, dk: jax.Array, dv: jax.Array, q: jax.Array, v: jax.Array) -> list[jax.Array]:
    """Returns dq, dk, dv, outputs of `run`, in the shapes of q, k (q's, perhaps with fewer heads) and v."""
    _, T, H, _ = q.shape
    heads = H, H * dk.shape[2] // dq.shape[2], v.shape[2]
    return [head_tokens(d, T, n, x.shape[-1]) for d, n, x in zip((dq, dk, dv), heads, (q, q, v), strict=True)]


def chunk_rows(log_decay: jax.Array, segments: jax.Array | None, C: int, heads: int, *scalars: jax.Array) -> jax.Array:
    """Returns the scalars of every grid step, [B, H/heads, N, R, C] float32.

    Rows: for each head the coarse and the fine cumulative sum of its log decay inside the chunk (see
    `chunks.cumulative`), then `heads` rows of each further scalar [B,T,H], then, where there are segments,
    each token's segment number and the one carried into the chunk; zeros up to a multiple of 8.
    """
    B, T, H = log_decay.shape

    def rows(x):  # [B,T,H] -> [B, H/heads, N, heads, C]
        x = pad_axis(x.astype(jnp.float32), 1, C)
        return x.reshape(B, -1, C, H // heads, heads).transpose(0, 3, 1, 4, 2)

    coarse, fine = cumulative(rows(log_decay))
    parts = [jnp.stack([coarse, fine], axis=4).reshape(*coarse.shape[:3], 2 * heads, C), *map(rows, scalars)]
    if segments is not None:
        chunks, carried = chunk_segments(segments, C)
        both = jnp.stack([chunks, jnp.broadcast_to(carried[..., None], chunks.shape)], axis=2)  # [N,B,2,C]
        both = both.transpose(1, 0, 2, 3)[:, None].astype(jnp.float32)
        parts.append(jnp.broadcast_to(both, (B, H // heads, *both.shape[2:])))
    return pad_axis(jnp.concatenate(parts, axis=3), 3, 8)


def from_rows(rows: jax.Array, heads: int, T: int, kind: int = 0) -> jax.Array:
    """Returns the kind-th group of `heads` rows of [B, H/heads, N, R, C], as [B,T,H]."""
    rows = rows[:, :, :, kind * heads : (kind + 1) * heads]
    B, G, N, _, C = rows.shape
    return rows.transpose(0, 2, 4, 1, 3).reshape(B, N * C, G * heads)[:, :T]


def decay_gradient(da: jax.Array, heads: int, T: int) -> jax.Array:
    """Returns the gradient of the log decays [B,T,H], given that of their cumulative sums inside chunks (rows 0 to heads - 1)."""
    return from_rows(jnp.flip(jnp.cumsum(jnp.flip(da, -1), axis=-1), -1), heads, T)
