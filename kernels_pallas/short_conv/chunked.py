"""The convolution as W shifted products, which XLA fuses into one pass over x."""

from __future__ import annotations

import jax.numpy as jnp


def short_conv_shifted(x, weight, bias, state, segments):
    T, W = x.shape[1], weight.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    inputs = jnp.concatenate([state, x], axis=1)
    taps = [inputs[:, j : j + T].astype(dtype) for j in range(W)]
    tail = inputs[:, T:]
    if segments is not None:
        owner = jnp.pad(segments, ((0, 0), (W - 1, 0)))  # the state belongs to the first segment, number 0
        taps = [jnp.where((owner[:, j : j + T] == segments)[..., None], tap, 0) for j, tap in enumerate(taps)]
        tail = jnp.where((owner[:, T:] == segments[:, -1:])[..., None], tail, 0)
    y = bias.astype(dtype)
    for j, tap in enumerate(taps):
        y = y + tap * weight[:, j].astype(dtype)
    return y, tail
