"""Conjugate gradients for (H + lambda I) x = q, H positive semi-definite, all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import alike
from kernels_pallas.gated_kalmanet.chebyshev import inverse

LEAST = 1e-30  # what is divided by when nothing is left of r, whose largest entry was 1


def conjugate_gradients(
    matvec: Callable[[jax.Array], jax.Array], q: jax.Array, norm: jax.Array, ridge_strength: float, num_iter: int
) -> jax.Array:
    """Returns x ~ (H + lambda I)^-1 q, lambda = ridge_strength F, F = |H|_F, after `num_iter` iterations from x = 0.

        a = r'r / p'(H / lambda + I) p,   x <- x + a p,   r <- r - a (H / lambda + I) p,   p <- r + (r'r / its last value) p

    The steps depend on the spectrum of H and on q, which is why fewer are needed than by `chebyshev`, whose steps know only F;
    x is not linear in q. Everything is divided by lambda, and q by its largest entry, so that the squares fit the dtype.

    Args:
      matvec: x -> H x, rows [..., K].
      q: [..., K].
      norm: F [...]; where it is at most `chebyshev.empty_norm` x is 0.

    Returns:
      x [..., K], in q's dtype.
    """
    s = inverse(norm)[..., None] / ridge_strength
    size = jnp.max(jnp.abs(q), axis=-1, keepdims=True)
    r = q / jnp.maximum(size, float(jnp.finfo(q.dtype).tiny))

    def total(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    def iterate(_, carry):
        x, r, p, old = carry
        moved = s * matvec(p) + p
        a = old / jnp.maximum(total(p * moved), LEAST)
        x, r = x + a * p, r - a * moved
        new = total(r * r)
        return x, r, r + new / jnp.maximum(old, LEAST) * p, new

    _, nothing = alike("conjugate_gradients", r, jnp.zeros_like(r))
    x, _, _, _ = jax.lax.fori_loop(0, num_iter, iterate, (nothing, r, r, total(r * r)))
    return s * size * x
