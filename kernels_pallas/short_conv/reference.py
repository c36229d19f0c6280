"""The convolution, token by token, over a window that slides."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.linear_attention.reference import scan_tokens


def short_conv_update(
    x: jax.Array,  # [B, D]
    weight: jax.Array,  # [D, W]
    bias: jax.Array,  # [D]
    window: jax.Array,  # [B, W - 1, D], the inputs before x
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, D] in float32, the window after one token), without the activation."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    taps = jnp.concatenate([window, x[:, None]], axis=1)
    y = jnp.sum(taps.astype(dtype) * weight.T.astype(dtype), axis=1) + bias.astype(dtype)
    return y, taps[:, 1:]


def short_conv_reference(
    x: jax.Array, weight: jax.Array, bias: jax.Array, state: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, T, D] in float32, the state), without the activation; see `kernels_pallas.contract.ShortConv`."""

    return scan_tokens(lambda x, window: short_conv_update(x, weight, bias, window), [x], segments, state)
