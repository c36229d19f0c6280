"""Causal depthwise convolution over a few tokens, with its activation.

y_t = act(sum_j w_j x_{t - W + 1 + j} + b)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import alike, check_shapes, pick_implementation, segment_index
from kernels_pallas.contract import ShortConv
from kernels_pallas.short_conv.chunked import short_conv_shifted
from kernels_pallas.short_conv.reference import short_conv_reference, short_conv_update
from kernels_pallas.short_conv.tpu import short_conv_tpu

__all__ = ["short_conv", "short_conv_step"]

ACTIVATIONS = {"silu": jax.nn.silu, None: lambda x: x}


def _activation(name: str | None) -> Callable[[jax.Array], jax.Array]:
    if name not in ACTIVATIONS:
        raise ValueError(f"short_conv: unknown activation {name!r}; have 'silu' and None")
    return ACTIVATIONS[name]


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    activation: str | None = "silu",
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution (torch's `Conv1d(groups=D)` with W - 1 zeros on the left).

    Args:
      x: [B, T, D].
      weight: [D, W]; the last column meets the current token.
      bias: [D], or None.
      activation: "silu" or None.
      initial_state: [B, W - 1, D], the tokens before x (oldest first), or None for zeros.
      segment_ids: [B, T] int, or None; a token sees its own segment only.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has).

    Returns:
      y [B, T, D] and the state [B, W - 1, D], both in x's dtype; inputs of earlier segments are 0 in it.

    Raises:
      ValueError: a shape does not fit the others, or the activation is unknown.
    """
    if x.ndim != 3 or weight.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"short_conv: x must be [B, T, D] with T > 0, weight [D, W]; got {x.shape}, {weight.shape}")
    B, T, D = x.shape
    W = weight.shape[1]
    check_shapes(
        "short_conv",
        dict(B=B, T=T, D=D, W=W, P=W - 1),
        weight=(weight, "D W"),
        bias=(bias, "D"),
        initial_state=(initial_state, "B P D"),
        segment_ids=(segment_ids, "B T"),
    )
    state = jnp.zeros((B, W - 1, D), x.dtype) if initial_state is None else initial_state.astype(x.dtype)
    bias = jnp.zeros(D, weight.dtype) if bias is None else bias
    _activation(activation)
    run = pick_implementation("short_conv", implementation, IMPLEMENTATIONS, x)
    arrays = alike("short_conv", x, weight, bias, state, segment_index(segment_ids))
    x, weight, added, state, segments = arrays
    y, state = run(x, weight, added, state, segments, activation)
    return y.astype(x.dtype), state


def short_conv_step(
    x: jax.Array,  # [B, D]
    weight: jax.Array,  # [D, W]
    bias: jax.Array | None = None,  # [D]
    activation: str | None = "silu",
    *,
    state: jax.Array,  # [B, W - 1, D]
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, D], the state after one token).

    Raises:
      ValueError: a shape does not fit the others, or the activation is unknown.
    """
    if x.ndim != 2 or weight.ndim != 2:
        raise ValueError(f"short_conv_step: x must be [B, D], weight [D, W]; got {x.shape}, {weight.shape}")
    (B, D), W = x.shape, weight.shape[1]
    dims = dict(B=B, D=D, W=W, P=W - 1)
    check_shapes("short_conv_step", dims, weight=(weight, "D W"), bias=(bias, "D"), state=(state, "B P D"))
    bias = jnp.zeros(x.shape[-1], weight.dtype) if bias is None else bias
    y, state = short_conv_update(*alike("short_conv_step", x, weight, bias, state.astype(x.dtype)))
    return _activation(activation)(y).astype(x.dtype), state


def _then_activation(convolve: Callable[..., tuple[jax.Array, jax.Array]]) -> ShortConv:
    """Returns an implementation of a convolution without the activation, and the activation after it."""

    def run(x, weight, bias, state, segments, activation):
        y, state = convolve(x, weight, bias, state, segments)
        return _activation(activation)(y), state

    return run


IMPLEMENTATIONS: dict[str, ShortConv] = {
    "reference": _then_activation(short_conv_reference),
    "xla": _then_activation(short_conv_shifted),
    "pallas_tpu": short_conv_tpu,
}
