"""The norm of each head, its bias and its rotation as formulas, which are the `xla` form too."""

from __future__ import annotations

import jax

from kernels_pallas.heads import repeat_heads
from kernels_pallas.mamba3.rotation import rotate
from kernels_pallas.numerics import rms_normalize


def norm_bias(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Returns x [..., R, heads, K], each head normed, for all heads of bias [H, R, K] and with it: [..., R, H, K]."""
    x = repeat_heads(rms_normalize(x, weight, eps), bias.shape[0])
    return x + bias.astype(x.dtype).swapaxes(0, 1)


def norm_turn_reference(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    q_bias: jax.Array,
    k_bias: jax.Array,
    angle: jax.Array,
    eps: float,
    halves: bool,
) -> tuple[jax.Array, jax.Array]:
    """The `reference` and `xla` implementation of `qk_norm_turn`: every step is rounded; see `kernels_pallas.contract`."""
    q, k = norm_bias(q, q_weight, q_bias, eps), norm_bias(k, k_weight, k_bias, eps)
    return rotate(q, angle[:, :, None], halves), rotate(k, angle[:, :, None], halves)
