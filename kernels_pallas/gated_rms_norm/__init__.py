"""RMS norm of each head with an output gate: what follows the recurrence of GDN, Gated KalmaNet and Mamba-2.

y = o / sqrt(mean(o^2) + eps) * weight * SiLU(gate), or the norm of o * SiLU(gate)
"""

from __future__ import annotations

import jax

from kernels_pallas.arguments import alike, check_floating, check_options, check_shapes, pick_implementation
from kernels_pallas.contract import GatedRMSNorm
from kernels_pallas.gated_rms_norm.reference import gated_rms_norm_reference
from kernels_pallas.gated_rms_norm.tpu import gated_rms_norm_tpu

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    o: jax.Array,
    gate: jax.Array,
    weight: jax.Array,
    eps: float = 1e-5,
    gate_first: bool = False,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """RMS norm of each head of o, times a weight and SiLU(gate): on TPU one pass forward and one backward.

    "reference" and "xla" round as a layer that writes it out: the norm is float32 inside (float64 if o is) and rounded to o's
    dtype, and so are SiLU(gate) and the product. The kernel computes everything in float32 and rounds the output only. A zero
    vector has a finite gradient.

    Args:
      o: [B, T, H, D], the heads' outputs.
      gate: [B, T, H, D], before its SiLU.
      weight: [D], the same for all heads, or [H, D].
      eps: added to the mean of the squares, above 0.
      gate_first: whether o is multiplied by SiLU(gate) before the norm (Mamba-2) and not behind it.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has); the kernel takes D = 64, 128 and 256,
        other sizes are computed by the XLA form.

    Returns:
      y [B, T, H, D] in o's dtype.

    Raises:
      ValueError: a shape does not fit the others, o is empty, or eps is not above 0.
    """
    op = "gated_rms_norm"
    if o.ndim != 4 or o.size == 0:
        raise ValueError(f"{op}: o must be [B, T, H, D] and not empty, got {tuple(o.shape)}")
    dims = dict(zip("BTHD", o.shape, strict=True))
    check_shapes(op, dims, gate=(gate, "B T H D"))
    if weight.shape not in (o.shape[3:], o.shape[2:]):
        raise ValueError(f"{op}: weight must be [D] or [H, D] of o {tuple(o.shape)}, got {tuple(weight.shape)}")
    check_options(op, eps=eps)
    check_floating(op, o=o, gate=gate)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, o, gate)
    o, gate, weight = alike(op, o, gate, weight)
    return run(o, gate, weight, eps, gate_first)


IMPLEMENTATIONS: dict[str, GatedRMSNorm] = {
    "reference": gated_rms_norm_reference,
    "xla": gated_rms_norm_reference,
    "pallas_tpu": gated_rms_norm_tpu,
}
