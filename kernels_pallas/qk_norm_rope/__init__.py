"""What attention does with its queries and keys: RMS norm of each head, rotary positions, the scale of the scores.

y = scale rotate(x / sqrt(mean(x^2) + eps) * weight), the heads before the tokens
"""

from __future__ import annotations

import jax

from kernels_pallas.arguments import alike, check_floating, check_options, check_shapes, pick_implementation
from kernels_pallas.contract import NormRope
from kernels_pallas.qk_norm_rope.reference import norm_rope_reference
from kernels_pallas.qk_norm_rope.tpu import norm_rope_tpu

__all__ = ["qk_norm_rope"]


def qk_norm_rope(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array | None,
    k_weight: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    eps: float = 1e-6,
    scale: float = 1.0,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Norms and rotates queries and keys, and moves their heads before the tokens: on TPU one pass forward and one backward.

    Channels i and i + R / 2 of a head turn together; those from R on stay as they are. "reference" and "xla" round behind the
    norm, the rotation and the scale, as a layer that writes them out; the kernel rounds once. cos and sin are constants: their
    gradients are 0.

    Args:
      q: [B, T, H, D].
      k: [B, T, Hkv, D].
      q_weight, k_weight: [D], or None for heads that are not normed.
      cos, sin: [B, T, R / 2], of each token's angles; R is at most D.
      eps: added to the mean of the squares, above 0.
      scale: what q is multiplied by; k is not.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has); the kernel takes R = D = 128 and 256,
        other sizes are computed by the XLA form.

    Returns:
      q [B, H, T, D] and k [B, Hkv, T, D], in their dtypes.

    Raises:
      ValueError: a shape does not fit the others, q or k is empty, eps is not above 0, or the scale is 0 or not finite.
    """
    op = "qk_norm_rope"
    if q.ndim != 4 or k.ndim != 4 or q.size == 0 or k.size == 0:
        raise ValueError(f"{op}: q and k must be [B, T, H, D] and not empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    dims = dict(zip("BTHD", q.shape, strict=True), G=k.shape[2], A=cos.shape[-1] if cos.ndim else 0)
    check_shapes(
        op, dims, k=(k, "B T G D"), q_weight=(q_weight, "D"), k_weight=(k_weight, "D"), cos=(cos, "B T A"), sin=(sin, "B T A")
    )
    if not 0 < 2 * dims["A"] <= dims["D"]:
        raise ValueError(f"{op}: cos has {dims['A']} angles, q {dims['D']} channels; an angle rotates two channels")
    check_options(op, eps=eps, scale=scale)
    check_floating(op, q=q, k=k)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, q, k)
    q, k, q_weight, k_weight, cos, sin = alike(op, q, k, q_weight, k_weight, *map(jax.lax.stop_gradient, (cos, sin)))
    return run(q, q_weight, cos, sin, eps, scale), run(k, k_weight, cos, sin, eps, 1.0)


IMPLEMENTATIONS: dict[str, NormRope] = {"reference": norm_rope_reference, "xla": norm_rope_reference, "pallas_tpu": norm_rope_tpu}
