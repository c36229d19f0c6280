"""The norm and the sum before it as formulas, which are the `xla` form too: XLA reads x once for the squares and once more."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalize(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last axis of x, [..., D] in x's dtype; None: no weight.

    Computed in float32, or float64 if x is.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    f = x.astype(dtype)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return (f if weight is None else f * weight.astype(dtype)).astype(x.dtype)


def rms_norm_reference(
    x: jax.Array, weight: jax.Array | None, residual: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The `reference` and `xla` implementation of `rms_norm`; see `kernels_pallas.contract`."""
    total = x if residual is None else x + residual
    return normalize(total, weight, eps), total
