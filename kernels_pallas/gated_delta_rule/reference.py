"""The recurrence, token by token."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.linear_attention.reference import scan_tokens


def gated_delta_rule_update(q, k, v, g, beta, S, scale):
    """One token of S <- e^g S; S <- S + beta k (v - S'k)'; o = scale q'S; shapes as in the step."""
    S = jnp.exp(g)[..., None, None] * S
    error = v - jnp.einsum("bhkv,bhk->bhv", S, k, precision="highest")
    S = S + (beta[..., None] * k)[..., :, None] * error[..., None, :]
    return scale * jnp.einsum("bhk,bhkv->bhv", q, S, precision="highest"), S


def gated_delta_rule_reference(q, k, v, log_decay, beta, state, segments, scale, chunk_size):
    del chunk_size
    arrays = [x.astype(state.dtype) for x in (q, k, v, log_decay, beta)]
    o, state = scan_tokens(lambda *a: gated_delta_rule_update(*a, scale), arrays, segments, state)
    return o.astype(v.dtype), state
