"""The norm of each head and its rotation as formulas, which are the `xla` form too."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.numerics import rms_normalize


def norm_rope_reference(
    x: jax.Array, weight: jax.Array | None, cos: jax.Array, sin: jax.Array, eps: float, scale: float
) -> jax.Array:
    """The `reference` and `xla` implementation of `qk_norm_rope`: each of its steps is rounded; see `kernels_pallas.contract`."""
    x = x if weight is None else rms_normalize(x, weight, eps)
    dtype, R = jnp.promote_types(x.dtype, jnp.float32), 2 * cos.shape[-1]
    a, b = (part.astype(dtype) for part in jnp.split(x[..., :R], 2, axis=-1))
    cos, sin = (table.astype(dtype)[:, :, None] for table in (cos, sin))
    turned = [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]
    x = jnp.concatenate([*turned, x[..., R:]], axis=-1)
    return (x if scale == 1 else (scale * x.astype(dtype)).astype(x.dtype)).swapaxes(1, 2)
