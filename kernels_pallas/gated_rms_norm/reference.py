"""The gated norm as formulas, which are the `xla` form too."""

from __future__ import annotations

import jax

from kernels_pallas.numerics import rms_normalize


def gated_rms_norm_reference(o: jax.Array, gate: jax.Array, weight: jax.Array, eps: float, gate_first: bool) -> jax.Array:
    """The `reference` and `xla` implementation of `gated_rms_norm`: every product is rounded; see `kernels_pallas.contract`."""
    if gate_first:
        return rms_normalize(o * jax.nn.silu(gate), weight, eps).astype(o.dtype)
    return (rms_normalize(o, weight, eps) * jax.nn.silu(gate)).astype(o.dtype)
