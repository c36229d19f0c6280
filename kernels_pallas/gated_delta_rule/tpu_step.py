"""One token on TPU: the state is read once and written once, though the rule reads it twice."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.gated_delta_rule.reference import gated_delta_rule_update
from kernels_pallas.mosaic_chunk import column_sum, each
from kernels_pallas.mosaic_step import columns, head_rows, run_step, with_gradient_of


def gated_delta_rule_step_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_tpu` implementation of `gated_delta_rule_step`; see `kernels_pallas.contract`."""

    def update(vectors, scalars, S):
        q, k, v = vectors
        keys = columns(k)
        S = each(jnp.multiply, S, head_rows(jnp.exp(scalars[0])))
        error = each(lambda s, k, v: v - column_sum(k * s), S, keys, head_rows(v))
        S = each(lambda s, k, b, e: s + k * (b * e), S, keys, head_rows(scalars[1]), error)
        return each(lambda s, q: scale * column_sum(q * s), S, columns(q)), S

    def kernel(q, k, v, log_decay, beta, state):
        return run_step(update, "gated_delta_rule_step", (q, k, v), (log_decay, beta), (state,))

    return with_gradient_of(functools.partial(gated_delta_rule_update, scale=scale), kernel)(q, k, v, log_decay, beta, state)
