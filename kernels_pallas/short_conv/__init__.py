"""Causal depthwise convolution over a few tokens, with its activation and with the norm of each head that a layer has around it.

y_t = act(sum_j w_j x_{t - W + 1 + j} + b)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import alike, check_options, check_shapes, pick_implementation, segment_index
from kernels_pallas.contract import HeadNorm, ShortConv
from kernels_pallas.short_conv.chunked import short_conv_shifted
from kernels_pallas.short_conv.heads import norm_inputs, norm_outputs
from kernels_pallas.short_conv.reference import short_conv_reference, short_conv_update
from kernels_pallas.short_conv.tpu import short_conv_tpu

__all__ = ["HeadNorm", "short_conv", "short_conv_step"]

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
    norm: HeadNorm | None = None,
    norm_weight: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution (torch's `Conv1d(groups=D)` with W - 1 zeros on the left), and a norm of each head.

    With a norm, "reference" and "xla" round as a layer that norms before or behind the convolution: the norm is float32 inside
    (float64 if x is), what it takes and returns is in x's dtype. The kernel rounds y and the state only. A zero vector has a
    finite gradient.

    Args:
      x: [B, T, D].
      weight: [D, W]; the last column meets the current token.
      bias: [D], or None.
      activation: "silu" or None.
      norm: of each head, `norm.dim` channels side by side: an L2 norm of the activation's outputs, or an RMS norm of x before
        the convolution; None (default): neither. On TPU heads of 64, 128 and 256 channels are normed in the convolution's
        kernel, others by XLA.
      norm_weight: [norm.dim], of an RMS norm; None: a norm without a weight.
      initial_state: [B, W - 1, D], the tokens before x (oldest first), normed if the norm is an RMS norm, or None for zeros.
      segment_ids: [B, T] int, or None; a token sees its own segment only.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has).

    Returns:
      y [B, T, D] and the state [B, W - 1, D], both in x's dtype; inputs of earlier segments are 0 in it, and an RMS norm's
      outputs are in it instead of inputs.

    Raises:
      ValueError: a shape does not fit the others, the activation or the norm's kind is unknown, or the norm's options do not fit.
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
    norm_weight = _norm_weight("short_conv", D, norm, norm_weight)
    run = pick_implementation("short_conv", implementation, IMPLEMENTATIONS, x)
    arrays = alike("short_conv", x, weight, bias, state, segment_index(segment_ids), norm_weight)
    x, weight, added, state, segments, norm_weight = arrays
    y, state = run(x, weight, added, state, segments, activation, norm, norm_weight)
    return y.astype(x.dtype), state


def _norm_weight(op: str, D: int, norm: HeadNorm | None, weight: jax.Array | None) -> jax.Array | None:
    """Returns the weight of an RMS norm, ones where none is given, and None for other norms.

    Raises:
      ValueError: the norm does not fit D channels or the weight, or an option is out of its range.
    """
    if norm is None:
        if weight is not None:
            raise ValueError(f"{op}: norm_weight is of an RMS norm; give norm=HeadNorm('rms', dim) with it")
        return None
    if norm.kind not in ("l2", "rms"):
        raise ValueError(f"{op}: unknown norm {norm.kind!r}; have 'l2' and 'rms'")
    if not isinstance(norm.dim, int) or norm.dim < 1 or D % norm.dim:
        raise ValueError(f"{op}: the norm's dim must be an integer that divides the {D} channels, got {norm.dim}")
    check_options(op, eps=norm.eps)
    if norm.kind == "l2":
        if weight is not None:
            raise ValueError(f"{op}: an L2 norm has no weight; multiply the outputs by it")
        return None
    if norm.eps_outside:
        raise ValueError(f"{op}: eps_outside is of an L2 norm; an RMS norm has eps below the root")
    check_shapes(op, dict(N=norm.dim), norm_weight=(weight, "N"))
    return jnp.ones(norm.dim, jnp.float32) if weight is None else weight


def short_conv_step(
    x: jax.Array,  # [B, D]
    weight: jax.Array,  # [D, W]
    bias: jax.Array | None = None,  # [D]
    activation: str | None = "silu",
    *,
    norm: HeadNorm | None = None,
    norm_weight: jax.Array | None = None,  # [norm.dim]
    state: jax.Array,  # [B, W - 1, D]
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, D], the state after one token); the norm and its weight are those of `short_conv`.

    Raises:
      ValueError: a shape does not fit the others, the activation or the norm's kind is unknown, or the norm's options do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2:
        raise ValueError(f"short_conv_step: x must be [B, D], weight [D, W]; got {x.shape}, {weight.shape}")
    (B, D), W = x.shape, weight.shape[1]
    dims = dict(B=B, D=D, W=W, P=W - 1)
    check_shapes("short_conv_step", dims, weight=(weight, "D W"), bias=(bias, "D"), state=(state, "B P D"))
    bias = jnp.zeros(x.shape[-1], weight.dtype) if bias is None else bias
    x = norm_inputs(x, norm, _norm_weight("short_conv_step", D, norm, norm_weight))
    y, state = short_conv_update(*alike("short_conv_step", x, weight, bias, state.astype(x.dtype)))
    return norm_outputs(_activation(activation)(y).astype(x.dtype), norm), state


def _with_the_rest(convolve: Callable[..., tuple[jax.Array, jax.Array]]) -> ShortConv:
    """Returns an implementation of a convolution without activation and norm, and these around it."""

    def run(x, weight, bias, state, segments, activation, norm, norm_weight):
        x = norm_inputs(x, norm, norm_weight)
        y, state = convolve(x, weight, bias, state, segments)
        return norm_outputs(_activation(activation)(y).astype(x.dtype), norm), state

    return run


IMPLEMENTATIONS: dict[str, ShortConv] = {
    "reference": _with_the_rest(short_conv_reference),
    "xla": _with_the_rest(short_conv_shifted),
    "pallas_tpu": short_conv_tpu,
}
