"""RMS norm over the hidden size, with the sum of the residual stream before it.

s = x + residual,     y = s / sqrt(mean(s^2) + eps) * weight
"""

from __future__ import annotations

from typing import overload

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import alike, check_floating, check_options, check_shapes, pick_implementation
from kernels_pallas.contract import RMSNorm
from kernels_pallas.rms_norm.reference import rms_norm_reference
from kernels_pallas.rms_norm.tpu import rms_norm_tpu

__all__ = ["rms_norm"]


@overload
def rms_norm(
    x: jax.Array, weight: jax.Array | None, eps: float = ..., residual: None = ..., *, implementation: str | None = ...
) -> jax.Array: ...
@overload
def rms_norm(
    x: jax.Array, weight: jax.Array | None, eps: float, residual: jax.Array, *, implementation: str | None = ...
) -> tuple[jax.Array, jax.Array]: ...
def rms_norm(
    x: jax.Array,
    weight: jax.Array | None,
    eps: float = 1e-6,
    residual: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """RMS norm of x, or of x + residual, over the last axis: on TPU one pass forward and one backward.

    The squares, the mean and the product with the weight are float32 (float64 if x is). The sum is rounded to its dtype before
    it is normed, so that the norm is that of the returned sum. A zero vector has a finite gradient.

    Args:
      x: [..., D].
      weight: [D], or None for a norm without one.
      eps: added to the mean of the squares, above 0.
      residual: x's shape, or None.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has); the kernel takes D that are multiples
        of 128, other sizes are computed by the XLA form.

    Returns:
      y [..., D]; with a residual the pair (y, x + residual). Both are in x's dtype, or in the wider one of x's and the residual's.

    Raises:
      ValueError: a shape does not fit the others, x is empty, or eps is not above 0.
    """
    op = "rms_norm"
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"{op}: x must be [..., D] and not empty, got {tuple(x.shape)}")
    check_shapes(op, dict(D=x.shape[-1]), weight=(weight, "D"))
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_options(op, eps=eps)
    check_floating(op, x=x)
    if residual is not None:
        dtype = jnp.promote_types(x.dtype, residual.dtype)
        x, residual = x.astype(dtype), residual.astype(dtype)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, x)
    x, weight, residual = alike(op, x, weight, residual)
    y, total = run(x, weight, residual, eps)
    return y if residual is None else (y, total)


IMPLEMENTATIONS: dict[str, RMSNorm] = {"reference": rms_norm_reference, "xla": rms_norm_reference, "pallas_tpu": rms_norm_tpu}
