"""The sums of angles, token by token, and the `xla` form, which adds up blocks of tokens."""

from __future__ import annotations

import jax

from kernels_pallas.linear_attention.reference import scan_tokens
from kernels_pallas.mamba3.rotation import cumulative_angles, within_turn


def angle_sums_reference(rate: jax.Array, dt: jax.Array, state: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The `reference` implementation of `angle_sums`; see `kernels_pallas.contract`."""

    def update(rate, dt, state):
        angle = within_turn(state + rate[:, None] * dt[..., None])
        return angle, angle

    return scan_tokens(update, [rate, dt], segments, state)[0]


def angle_sums_xla(rate: jax.Array, dt: jax.Array, state: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The `xla` implementation of `angle_sums`; see `kernels_pallas.contract`."""
    return cumulative_angles(rate[:, :, None] * dt[..., None], state, segments)
