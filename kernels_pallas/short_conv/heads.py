"""The norms of heads around a convolution, as formulas: what the kernel computes where it has the head's size, and else calls."""

from __future__ import annotations

import jax

from kernels_pallas.contract import HeadNorm
from kernels_pallas.numerics import l2_normalize, rms_normalize


def norm_inputs(x: jax.Array, norm: HeadNorm | None, weight: jax.Array | None) -> jax.Array:
    """Returns the convolution's inputs [..., D]: x, or x normed head by head if the norm is an RMS norm."""
    if norm is None or norm.kind != "rms":
        return x
    return rms_normalize(x.reshape(*x.shape[:-1], -1, norm.dim), weight, norm.eps).reshape(x.shape)


def norm_outputs(y: jax.Array, norm: HeadNorm | None) -> jax.Array:
    """Returns the outputs [..., D]: y, or y normed head by head if the norm is an L2 norm."""
    if norm is None or norm.kind != "l2":
        return y
    heads = y.reshape(*y.shape[:-1], -1, norm.dim)
    return l2_normalize(heads, eps=norm.eps, eps_outside=norm.eps_outside).reshape(y.shape)
