"""The norm and the sum before it as formulas, which are the `xla` form too: XLA reads x once for the squares and once more."""

from __future__ import annotations

import jax

from kernels_pallas.numerics import rms_normalize


def rms_norm_reference(
    x: jax.Array, weight: jax.Array | None, residual: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The `reference` and `xla` implementation of `rms_norm`; see `kernels_pallas.contract`."""
    total = x if residual is None else x + residual
    return rms_normalize(total, weight, eps), total
