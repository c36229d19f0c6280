"""The angles of Mamba-3's rotations: each head's own step sizes times rates that heads share, added up over the tokens.

angle_t = angle_{t-1} + dt_t rate_t modulo a turn
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.angle_sums.reference import angle_sums_reference, angle_sums_xla
from kernels_pallas.angle_sums.tpu import angle_sums_tpu
from kernels_pallas.arguments import accumulator, alike, check_shapes, pick_implementation, segment_index
from kernels_pallas.contract import AngleSums

__all__ = ["angle_sums"]


def angle_sums(
    rate: jax.Array,
    dt: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds up the rotations dt rate over the tokens: on TPU one pass forward and one backward.

    Args:
      rate: [B, T, A], in radians.
      dt: [B, T, H].
      initial_state: [B, H, A], the angles before the first token, or None for 0.
      segment_ids: [B, T], or None. The sums restart from 0 where the id changes.
      implementation: "reference", "xla", "pallas_tpu" or None (the best the backend has); the kernel takes up to 128 angles, and up
        to 8,192 of all heads together, other sizes are computed by the XLA form.

    Returns:
      angle [B, T, H, A], about [0, 2 pi), and the last token's, [B, H, A]; float32 (float64 if an input is).

    Raises:
      ValueError: a shape does not fit the others, or rate or dt is empty.
    """
    op = "angle_sums"
    if rate.ndim != 3 or dt.ndim != 3 or dt.size == 0:
        shapes = f"{tuple(rate.shape)} and {tuple(dt.shape)}"
        raise ValueError(f"{op}: rate must be [B, T, A], and dt [B, T, H] and not empty, got {shapes}")
    dims = dict(zip("BTH", dt.shape, strict=True), A=rate.shape[2])
    check_shapes(op, dims, rate=(rate, "B T A"), initial_state=(initial_state, "B H A"), segment_ids=(segment_ids, "B T"))
    dtype = accumulator(rate, dt)
    state = jnp.zeros([dims[n] for n in "BHA"], dtype) if initial_state is None else initial_state.astype(dtype)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, rate, dt)
    rate, dt, state, segments = alike(op, rate.astype(dtype), dt.astype(dtype), state, segment_index(segment_ids))
    angle = run(rate, dt, state, segments)
    return angle, angle[:, -1]


IMPLEMENTATIONS: dict[str, AngleSums] = {
    "reference": angle_sums_reference,
    "xla": angle_sums_xla,
    "pallas_tpu": angle_sums_tpu,
}
