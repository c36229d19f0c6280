"""Elementary functions with finite gradients everywhere, for the kernels and for the layers that call them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns the square root of x, with gradient 0 where x is 0, as for the norm of an empty state or of a zero vector."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def l2_normalize(x: jax.Array, *, eps: float = 1e-6, eps_outside: bool) -> jax.Array:
    """Returns x / (|x| + eps), or x / sqrt(|x|^2 + eps) if not `eps_outside`, over the last axis of x [..., D].

    Computed in float32 (float64 if x is) and returned in x's dtype. A zero vector has a finite gradient.
    """
    f = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(f * f, axis=-1, keepdims=True)
    if not eps_outside:
        return (f * jax.lax.rsqrt(square + eps)).astype(x.dtype)
    return (f / (safe_sqrt(square) + eps)).astype(x.dtype)


def rms_normalize(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last axis of x, [..., D] in x's dtype; None: no weight.

    Computed in float32, or float64 if x is.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    f = x.astype(dtype)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return (f if weight is None else f * weight.astype(dtype)).astype(x.dtype)
