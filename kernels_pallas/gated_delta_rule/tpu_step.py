"""One token on TPU: the state is read once and written once, though the rule reads it twice."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.gated_delta_rule.reference import gated_delta_rule_update
from kernels_pallas.mosaic import each
from kernels_pallas.mosaic_step import columns, head_rows, reduce_rows, run_step, with_gradient_of


def gated_delta_rule_step_tpu(q, k, v, log_decay, beta, state, scale):
    def update(vectors, scalars, S):
        q, k, v = vectors
        keys = columns(k)
        S = each(jnp.multiply, S, head_rows(jnp.exp(scalars[0])))
        error = each(lambda s, k, v: v - reduce_rows(k * s), S, keys, head_rows(v))
        S = each(lambda s, k, b, e: s + k * (b * e), S, keys, head_rows(scalars[1]), error)
        return each(lambda s, q: scale * reduce_rows(q * s), S, columns(q)), S

    def kernel(q, k, v, log_decay, beta, state):
        return run_step(update, "gated_delta_rule_step", (q, k, v), (log_decay, beta), (state,))

    return with_gradient_of(lambda *a: gated_delta_rule_update(*a, scale), kernel)(q, k, v, log_decay, beta, state)
