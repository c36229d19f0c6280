"""The convolution, token by token, over a window that slides."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.linear_attention.reference import scan_tokens


def short_conv_update(x, weight, bias, window):
    """One token: x [B,D], window [B,W-1,D] of the inputs before it -> (y [B,D] in float32, window)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    taps = jnp.concatenate([window, x[:, None]], axis=1)
    y = jnp.sum(taps.astype(dtype) * weight.T.astype(dtype), axis=1) + bias.astype(dtype)
    return y, taps[:, 1:]


def short_conv_reference(x, weight, bias, state, segments):
    return scan_tokens(lambda x, window: short_conv_update(x, weight, bias, window), [x], segments, state)
