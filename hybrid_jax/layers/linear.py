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
        """Maps x [..., in] to one output [..., size] for each of `sizes`, side by side in the kernel and each sharded by itself.

        On a TPU the large ones are products of their own, because a slice of a product's result is a copy of it, and the gradients
        of slices are put together by another."""
        bounds = list(itertools.accumulate(sizes))[:-1]
        alone = axis_size("tensor") > 1
        if not alone and backend() != "tpu":
            return jnp.split(self(x), bounds, axis=-1)
        kernels = jnp.split(self.kernel[...].astype(x.dtype), bounds, axis=1)
        biases = [None] * len(sizes) if self.bias is None else jnp.split(self.bias[...].astype(x.dtype), bounds)
        if alone:
            axes = marks_of(self.kernel).axes
            kernels = [constrain(kernel, *axes) for kernel in kernels]
            biases = [None if bias is None else constrain(bias, axes[1]) for bias in biases]
            return [_affine(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]
        small = [n for n, size in enumerate(sizes) if SMALL * size <= max(sizes)]
        together = dict(zip(small, _products(x, [kernels[n] for n in small], [biases[n] for n in small]), strict=True))
        return [together[n] if n in together else _affine(x, kernels[n], biases[n]) for n in range(len(sizes))]


SMALL = 4  # a part of a map is small if the largest is so many times as wide


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = x @ kernel
    return y if bias is None else y + bias


def _products(x: jax.Array, kernels: Sequence[jax.Array], biases: Sequence[jax.Array | None]) -> list[jax.Array]:
    """Returns x times each kernel, plus its bias, by one product."""
    if not kernels:
        return []
    bounds = list(itertools.accumulate(kernel.shape[1] for kernel in kernels))[:-1]
    parts = jnp.split(x @ jnp.concatenate(kernels, axis=1), bounds, axis=-1)
    return [y if bias is None else y + bias for y, bias in zip(parts, biases, strict=True)]


def products(x: jax.Array, maps: Sequence[Linear]) -> list[jax.Array]:
    """Returns each map's output [..., out] of x [..., in].

    On a TPU whose mesh does not shard heads small maps are one product: a product of 32 columns takes the matrix units the time of
    128, and the gradient of x is added up over as many products.
    """
    if backend() != "tpu" or axis_size("tensor") > 1:
        return [linear(x) for linear in maps]
    biases = [None if linear.bias is None else linear.bias[...].astype(x.dtype) for linear in maps]
    return _products(x, [linear.kernel[...].astype(x.dtype) for linear in maps], biases)


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
        return (hidden_norm if x.ndim == 3 else rms_normalize)(x, self.scale(), self.eps)

    def scale(self) -> jax.Array:
        """Returns what normed channels are multiplied by, [dim]: offset + weight, in float32 if there is an offset."""
        weight = self.weight[...]
        return weight.astype(jnp.float32) + self.offset if self.offset else weight


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
