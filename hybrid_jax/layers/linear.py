"""Linear maps, embeddings and norms, with parameters named as in Hugging Face checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.parameter import marks_of, parameter
from hybrid_jax.parallel.embedding import lookup
from hybrid_jax.parallel.norms import hidden_norm
from hybrid_jax.parallel.sharding import axis_size, constrain
from kernels_pallas.arguments import backend
from kernels_pallas.numerics import rms_normalize


class Linear(nnx.Module):
    """y = x W + b. Parameters: `kernel` [in, out] (a checkpoint's `weight` transposed) and `bias` [out].

    Args:
      axes: logical names of the kernel's two axes, for sharding.
      std: standard deviation of a new kernel, drawn from a normal distribution; a new bias is 0. Transformers
        initializes every linear map in this way, those of mixers too, with the config's `initializer_range`.
      own_start: a new kernel is drawn from a uniform distribution of this standard deviation, whatever `fresh_parameters`
        (`priming.fresh`) says of others.
    """

    def __init__(
        self,
        din: int,
        dout: int,
        *,
        std: float,
        bias: bool = False,
        axes: tuple[str | None, str | None] = ("embed", "heads"),
        muon: bool = True,
        own_start: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        if own_start:
            kernel = jax.random.uniform(rngs.params(), (din, dout), dtype, minval=-(3**0.5) * std, maxval=3**0.5 * std)
        else:
            kernel = std * jax.random.normal(rngs.params(), (din, dout), dtype)
        marks: dict[str, Any] = dict(compute=True, frozen=True, decay=True, muon=muon, own_start=own_start, layout="transposed")
        self.kernel = parameter(kernel, axes, **marks)
        self.bias = parameter(jnp.zeros(dout, dtype), (axes[1],)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., in] to [..., out], in x's dtype."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def parts(self, x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
        """Maps x [..., in] to one output [..., size] for each of `sizes`, side by side in the kernel and each sharded by itself."""
        bounds = list(itertools.accumulate(sizes))[:-1]
        if axis_size("tensor") == 1:
            return jnp.split(self(x), bounds, axis=-1)
        kernels = jnp.split(self.kernel[...].astype(x.dtype), bounds, axis=1)
        parts = [x @ constrain(kernel, *marks_of(self.kernel).axes) for kernel in kernels]
        if self.bias is None:
            return parts
        biases = jnp.split(self.bias[...].astype(x.dtype), bounds)
        return [part + constrain(bias, *marks_of(self.bias).axes) for part, bias in zip(parts, biases, strict=True)]


def products(x: jax.Array, maps: Sequence[Linear]) -> list[jax.Array]:
    """Returns each map's output [..., out] of x [..., in].

    On a TPU whose mesh does not shard heads small maps are one product: a product of 32 columns takes the matrix units the time of
    128, and the gradient of x is added up over as many products.
    """
    if backend() != "tpu" or axis_size("tensor") > 1:
        return [linear(x) for linear in maps]
    kernel = jnp.concatenate([linear.kernel[...].astype(x.dtype) for linear in maps], axis=1)
    parts = jnp.split(x @ kernel, list(itertools.accumulate(linear.kernel.shape[1] for linear in maps))[:-1], axis=-1)
    return [y if m.bias is None else y + m.bias[...].astype(x.dtype) for y, m in zip(parts, maps, strict=True)]


class Embedding(nnx.Module):
    """Token embedding, `embedding` [vocab, hidden]; a tied output head reads it too."""

    def __init__(self, vocab: int, hidden: int, *, std: float, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        table = std * jax.random.normal(rngs.params(), (vocab, hidden), dtype)
        self.embedding = parameter(table, ("vocab", "embed"), frozen=True, decay=True)

    def __call__(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of ids [B, T], [B, T, hidden], in `dtype`."""
        return lookup(self.embedding[...], ids, dtype)


def norm_heads(norm: RMSNorm | LayerNorm | None, x: jax.Array) -> jax.Array:
    """Norms x [B, T, H, D] over each head or over all heads together, whichever the norm is as wide as; None: not at all."""
    return x if norm is None else norm(x.reshape(*x.shape[:2], -1, norm.weight.shape[0])).reshape(x.shape)


class RMSNorm(nnx.Module):
    """`rms_normalize` by offset + a learned weight [dim], which begins at 1 - offset."""

    def __init__(self, dim: int, *, eps: float, offset: float = 0.0, dtype: DTypeLike = jnp.float32):
        self.weight = parameter(jnp.full(dim, 1 - offset, dtype), ("norm",))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., dim] over its last axis; one of three axes is the residual stream's [B, T, dim]."""
        weight = self.weight[...].astype(jnp.float32) + self.offset if self.offset else self.weight[...]
        return (hidden_norm if x.ndim == 3 else rms_normalize)(x, weight, self.eps)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, with a learned weight and bias [dim], in float32."""

    def __init__(self, dim: int, *, eps: float, dtype: DTypeLike = jnp.float32):
        self.weight = parameter(jnp.ones(dim, dtype), ("norm",))
        self.bias = parameter(jnp.zeros(dim, dtype), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., dim] over its last axis; returned in x's dtype."""
        f = x.astype(jnp.float32)
        centred = rms_normalize(f - jnp.mean(f, axis=-1, keepdims=True), self.weight[...], self.eps)
        return (centred + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def source_norm(config: ModelConfig, dim: int, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """Returns a norm over `dim` channels of the kind that the source family has."""
    if config.layer_norm:
        return LayerNorm(dim, eps=config.rms_norm_eps, dtype=dtype)
    return RMSNorm(dim, eps=config.rms_norm_eps, offset=config.norm_offset, dtype=dtype)
