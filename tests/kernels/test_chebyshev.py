"""Gated KalmaNet's solve is as exact as its docstring says, for every token: the ridge is relative to |H|_F."""

import numpy as np
import pytest

from kernels_pallas.gated_kalmanet.chebyshev import chebyshev

RIDGE = 0.02


def bound(num_iter: int) -> float:
    """1 / T_n(1 + 2 RIDGE) of the Chebyshev polynomial of degree n = num_iter + 1."""
    return float(1 / np.cosh((num_iter + 1) * np.arccosh(1 + 2 * RIDGE)))


def relative_error(H: np.ndarray, q: np.ndarray, num_iter: int) -> float:
    """The error of the solve in float32 over the length of the exact solution, which is found in float64."""
    norm = np.linalg.norm(H)
    exact = np.linalg.solve(H + RIDGE * norm * np.eye(len(q)), q)
    low = H.astype(np.float32)
    x = chebyshev(lambda x: x @ low, q.astype(np.float32), np.float32(norm), RIDGE, num_iter)
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("num_iter", [1, 10, 30])
def test_one_key_attains_the_bound(num_iter):
    key, other = np.eye(8)[:2]
    for query in (key, other):  # the two ends of the spectrum
        assert relative_error(3 * np.outer(key, key), query, num_iter) == pytest.approx(bound(num_iter), rel=0.05)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize(
    ("correlation", "log_decay"), [(0.0, -0.001), (0.0, -0.1), (0.95, -0.02)], ids=["slow decay", "fast decay", "correlated keys"]
)
def test_thirty_iterations_reach_3e_4_for_every_token_of_a_stream(correlation, log_decay, size):
    rng = np.random.default_rng(0)
    H, key = np.zeros((16, 16)), rng.normal(size=16)
    for token in range(64):
        key = correlation * key + np.sqrt(1 - correlation**2) * rng.normal(size=16)
        H = np.exp(log_decay) * H + size * np.outer(key, key)
        if token % 9 == 0:
            assert relative_error(H, rng.normal(size=16), 30) < 1.05 * bound(30) < 3.5e-4
