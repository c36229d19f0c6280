"""What `gated_kalmanet` takes besides q, k, v, gates and decays, for the forms that do not know it: groups and `beta`."""

from __future__ import annotations

import jax

from kernels_pallas.arguments import accumulator
from kernels_pallas.contract import GatedKalmaNet, PlainGatedKalmaNet, States
from kernels_pallas.heads import repeat_heads


def gated(x: jax.Array, beta: jax.Array | None, H: int) -> jax.Array:
    """Returns x [..., heads, D] of H heads, each times beta [..., H], multiplied in float32, in x's dtype."""
    x = repeat_heads(x, H)
    return x if beta is None else (x.astype(accumulator(x, beta)) * beta[..., None]).astype(x.dtype)


def composed(run: PlainGatedKalmaNet) -> GatedKalmaNet:
    """Returns an implementation of `gated_kalmanet` from one for as many heads of k and v as of q, without `beta`."""

    def implementation(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        alpha: jax.Array,
        log_decay: jax.Array,
        beta: jax.Array | None,
        state: States,
        segments: jax.Array | None,
        scale: float,
        chunk_size: int | None,
        ridge_strength: float,
        num_iter: int,
        bp_lambda: bool,
        precision: str,
        solver: str,
    ) -> tuple[jax.Array, States]:
        k, v = (gated(x, beta, q.shape[2]) for x in (k, v))
        options = (scale, chunk_size, ridge_strength, num_iter, bp_lambda, precision, solver)
        return run(q, k, v, alpha, log_decay, state, segments, *options)

    return implementation
