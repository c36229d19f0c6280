"""Chebyshev iteration for (H + lambda I) x = q, H positive semi-definite with eigenvalues up to |H|_F."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels_pallas.arguments import alike


def chebyshev(
    matvec: Callable[[jax.Array], jax.Array], q: jax.Array, norm: jax.Array, ridge_strength: float, num_iter: int
) -> jax.Array:
    """Returns x ~ (H + lambda I)^-1 q for eigenvalues in the interval [lambda, lambda + F], F = |H|_F, lambda = ridge_strength F.

        s = 2 / (2 lambda + F),   r = (F / (2 lambda + F) / 2)^2,   omega_0 = 2
        omega <- 1 / (1 - r omega),   x <- omega (x - s ((H + lambda I) x - q)) - (omega - 1) x_prev

    r does not depend on F, so the omegas are the same for every token. In exact arithmetic |x - x*| is at most
    |x*| / T_n(1 + 2 ridge_strength), T_n the Chebyshev polynomial of degree n = num_iter + 1; one key attains it.

    Args:
      matvec: x -> H x, rows [..., K].
      q: [..., K].
      norm: F [...]; where it is at most `empty_norm` x is 0.

    Returns:
      x [..., K], in q's dtype.
    """
    alive = norm > empty_norm(norm.dtype)
    F = jnp.where(alive, norm, 1.0)[..., None]
    s = 1.0 / (F * (ridge_strength + 0.5))
    r = (0.25 / (ridge_strength + 0.5)) ** 2

    def iterate(_, carry):
        x, previous, omega = carry
        omega = 1.0 / (1.0 - r * omega)
        residual = matvec(x) + ridge_strength * F * x - q
        return omega * (x - s * residual) - (omega - 1.0) * previous, x, omega

    q = q * alive[..., None]
    _, nothing = alike("chebyshev", q, jnp.zeros_like(q))
    x, _, _ = jax.lax.fori_loop(0, num_iter, iterate, (s * q, nothing, jnp.asarray(2.0, q.dtype)))
    return x


def empty_norm(dtype: DTypeLike) -> float:
    """Returns the norm up to which a state counts as empty: 2^-100 in float32. x grows like 1 / norm and must fit the dtype."""
    return float(jnp.finfo(dtype).tiny) * 2.0**26


def inverse(x: jax.Array) -> jax.Array:
    """Returns 1 / x of sizes x >= 0, and 0 where x is at most `empty_norm`."""
    alive = x > empty_norm(x.dtype)
    return jnp.where(alive, 1.0 / jnp.where(alive, x, 1.0), 0.0)


def coefficients(ridge_strength: float, num_iter: int) -> np.ndarray:
    """Returns [num_iter, 2] float32: omega - 1 and omega of every iteration, which do not depend on H."""
    r, omega, rows = (0.25 / (ridge_strength + 0.5)) ** 2, 2.0, []
    for _ in range(num_iter):
        omega = 1.0 / (1.0 - r * omega)
        rows.append((omega - 1.0, omega))
    return np.asarray(rows, np.float32).reshape(num_iter, 2)
