"""The convolution as W shifted products, which XLA fuses into one pass over x."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def short_conv_shifted(
    x: jax.Array,  # [B, T, D]
    weight: jax.Array,  # [D, W]
    bias: jax.Array,  # [D]
    state: jax.Array,  # [B, W - 1, D]
    segments: jax.Array | None,  # [B, T]
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, T, D] in float32, the state), without the activation; see `kernels_pallas.contract.ShortConv`."""
    T, W = x.shape[1], weight.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    inputs = jnp.concatenate([state, x], axis=1)
    taps = [inputs[:, j : j + T].astype(dtype) for j in range(W)]
    if segments is not None:
        owner = _owner(segments, W)
        taps = [jnp.where((owner[:, j : j + T] == segments)[..., None], tap, 0) for j, tap in enumerate(taps)]
    y = bias.astype(dtype)
    for j, tap in enumerate(taps):
        y = y + tap * weight[:, j].astype(dtype)
    return y, last_inputs(x, state, segments)


def last_inputs(x: jax.Array, state: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Returns the state after x, or after tokens of which x is the end: the last W - 1 inputs, zeros for earlier segments' ones."""
    W = state.shape[1] + 1
    tail = jnp.concatenate([state, x[:, -(W - 1) :]], axis=1)[:, -(W - 1) :] if W > 1 else state
    if segments is None:
        return tail
    return jnp.where((_owner(segments, W)[:, segments.shape[1] :] == segments[:, -1:])[..., None], tail, 0)


def _owner(segments: jax.Array, W: int) -> jax.Array:
    """Returns the segments of [state, x]: the state belongs to the first one, number 0."""
    return jnp.pad(segments, ((0, 0), (W - 1, 0)))
