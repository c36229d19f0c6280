"""Conjugate gradients solve Gated KalmaNet as well as Chebyshev's iteration does: judged by the output, on keys of many kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from tests.conftest import relative_error
from tests.kernels.test_extremes import weak

T, D, RIDGE = 192, 128, 0.02
CG = dict(solver="cg", num_iter=18)


def low(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def walk(rng, correlation):
    """Vectors [T, D], each correlated with the one before."""
    x = rng.standard_normal((T, D))
    for t in range(1, T):
        x[t] = correlation * x[t - 1] + np.sqrt(1 - correlation**2) * x[t]
    return x


def silu(x):
    return x / (1 + np.exp(-x))


def symmetric(rng, eigenvalues):
    axes, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return (axes * eigenvalues) @ axes.T


@functools.cache
def streams():
    """Twelve kinds of tokens, one per head, as bf16 numbers in float32: (q, k, v [T, 12, D], log decays [T, 12], (H, S))."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, T, 12, D))
    g, H, S = np.full((T, 12), -0.01), np.zeros((12, D, D)), np.zeros((12, D, D))
    g[:, 1] = -0.3 * rng.uniform(size=T)  # a fast decay
    for head, correlation, decay in ((2, 0.95, 0.02), (3, 0.99, 0.02), (10, 0.99, 0.004)):
        k[:, head], g[:, head] = walk(rng, correlation), -decay * rng.uniform(size=T)
    q[:, 10] = k[:, 10] + 0.1 * q[:, 10]  # queries that are nearly the keys
    k[:, 4] += 3 * rng.standard_normal(D)  # a common mean
    q[:, 5], k[:, 5] = silu(2 * q[:, 5]), silu(2 * k[:, 5])
    g[:, 6] = -np.exp(rng.uniform(np.log(0.5), np.log(20), T))  # decays that leave little or nothing
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    k[:40, 7] = 0  # an empty state, and keys after it
    H[8], H[9] = symmetric(rng, 30 * np.logspace(0, -4, D)), symmetric(rng, np.where(np.arange(D) < 4, 300.0, 0.01))
    S[8:10], g[:, 8:10] = 0.3 * rng.standard_normal((2, D, D)), -0.001
    k[:, 8:10] *= 0.3
    k[:, 11], g[:, 11] = k[:, 11] * rng.uniform(size=(T, 1)), 0
    return *map(low, (q, k, v)), np.float32(g), (np.float32(H), np.float32(S))


@functools.cache
def exact():
    """The outputs [T, 12, D] with exact solutions, in float64."""
    q, k, v, g, (H, S) = jax.tree.map(np.float64, streams())
    o = np.zeros_like(v)
    for t in range(T):
        H, S = (np.exp(g[t])[:, None, None] * s + k[t][..., None] * x[t][:, None] for s, x in ((H, k), (S, v)))
        norm = np.linalg.norm(H, axis=(1, 2))
        ridge = np.where(norm > 0, RIDGE * norm, 1)
        x = np.linalg.solve(H + ridge[:, None, None] * np.eye(D), q[t][..., None])[..., 0] * (norm > 0)[:, None]
        o[t] = D**-0.5 * np.einsum("hkv,hk->hv", S, x)
    return o


def errors(implementation, dtype, **options):
    """The error of the output of every stream."""
    q, k, v, g, state = streams()
    arrays = [jnp.asarray(x[None], dtype) for x in (q, k, v)]
    # a bf16 output would be rounded to 1.7e-3
    state = tuple(jnp.asarray(s[None]) for s in state)
    alpha = jnp.ones((1, T, 12))
    o, _ = kp.gated_kalmanet(
        *arrays, alpha, jnp.asarray(g[None]), initial_state=state, implementation=implementation, **options
    )
    difference = np.asarray(o, np.float64)[0] - exact()
    return np.sqrt((difference**2).sum((0, 2)) / (exact() ** 2).sum((0, 2)))
