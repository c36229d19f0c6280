"""What Mamba-3 does with its queries and keys (C and B): RMS norm of each head, a bias, and a rotation by each head's own angles.

y = rotate(x / sqrt(mean(x^2) + eps) * weight + bias, angle)
"""

from __future__ import annotations

import jax

from kernels_pallas.arguments import alike, check_floating, check_options, check_shapes, pick_implementation
from kernels_pallas.contract import NormTurn
from kernels_pallas.heads import grouped
from kernels_pallas.qk_norm_turn.reference import norm_bias, norm_turn_reference
from kernels_pallas.qk_norm_turn.tpu import norm_turn_tpu

__all__ = ["norm_bias", "qk_norm_turn"]


def qk_norm_turn(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    q_bias: jax.Array,
    k_bias: jax.Array,
    angle: jax.Array,
    eps: float = 1e-6,
    *,
    halves: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Norms queries and keys, adds their biases and rotates them: on TPU one pass forward and one backward.

    "reference" and "xla" round behind the norm, the bias and each product of the rotation. With bfloat16 the kernel rounds what the
    sines multiply and the result. Both round the cosines and sines to the dtype of q and k.

    Args:
      q: [B, T, R, Hq, K], Hq a divisor of H: head h of the result is of head h // (H / Hq), as if each head were repeated in place.
      k: [B, T, R, Hk, K], likewise.
      q_weight, k_weight: [K].
      q_bias, k_bias: [H, R, K].
      angle: [B, T, H, A], A <= K / 2, in radians: the first A pairs of channels are rotated, the others stay.
      eps: added to the mean of the squares, above 0.
      halves: whether channel j is rotated with j + K / 2, or 2j with 2j + 1.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has); the kernel takes heads of 128 and
        256 channels and at least one angle, other sizes are computed by the XLA form.

    Returns:
      q and k [B, T, R, H, K], in their dtypes.

    Raises:
      ValueError: a shape does not fit the others, q, k or angle is empty, or eps is not above 0.
    """
    op = "qk_norm_turn"
    if q.ndim != 5 or k.ndim != 5 or angle.ndim != 4 or q.size == 0 or k.size == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, angle))
        raise ValueError(f"{op}: q and k must be [B, T, R, heads, K] and not empty, and angle [B, T, H, A], got {shapes}")
    B, T, R, _, K = q.shape
    dims = grouped(op, dict(B=B, T=T, R=R, K=K, H=angle.shape[2], A=angle.shape[3]), "angle", q=q, k=k)
    check_shapes(
        op, dims, k=(k, "B T R Hk K"), q_weight=(q_weight, "K"), k_weight=(k_weight, "K"), q_bias=(q_bias, "H R K"),
        k_bias=(k_bias, "H R K"), angle=(angle, "B T H A"),
    )  # fmt: skip
    if 2 * dims["A"] > K or K % 2:
        raise ValueError(f"{op}: angle has {dims['A']} angles, q {K} channels; an angle rotates two of an even number of channels")
    check_options(op, eps=eps)
    check_floating(op, q=q, k=k)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, q, k, angle)
    q, k, q_weight, k_weight, q_bias, k_bias, angle = alike(op, q, k, q_weight, k_weight, q_bias, k_bias, angle)
    return run(q, k, q_weight, k_weight, q_bias, k_bias, angle, eps, halves)


IMPLEMENTATIONS: dict[str, NormTurn] = {"reference": norm_turn_reference, "xla": norm_turn_reference, "pallas_tpu": norm_turn_tpu}
