"""One token on TPU: the state is read once and written once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear_attention.reference import linear_attention_update
from kernels_pallas.mosaic_chunk import column_sum, each
from kernels_pallas.mosaic_step import columns, head_rows, run_step, with_gradient_of


def linear_attention_step_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `linear_attention_step`; see `kernels_pallas.contract`."""

    def update(vectors, scalars, S):
        q, k, v = vectors
        decay = head_rows(jnp.exp(scalars[0]))
        S = each(lambda s, d, k, v: d * s + k * v, S, decay, columns(k), head_rows(v))
        return each(lambda s, q: scale * column_sum(q * s), S, columns(q)), S

    def kernel(q, k, v, log_decay, state):
        return run_step(update, "linear_attention_step", (q, k, v), (log_decay,), (state,))

    return with_gradient_of(functools.partial(linear_attention_update, scale=scale), kernel)(q, k, v, log_decay, state)
