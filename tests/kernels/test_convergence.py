"""The study of the solve's iterations: what the default of 30 stands on."""

import numpy as np
import pytest

from kernels_pallas.gated_kalmanet.chebyshev import chebyshev
from kernels_pallas.lab.convergence import RIDGE, STREAMS, iterations, main, study


def test_the_study_iterates_as_the_kernels_do():
    rng = np.random.default_rng(0)
    H, q = np.cov(rng.normal(size=(8, 20))).astype(np.float32), rng.normal(size=8).astype(np.float32)
    F = np.linalg.norm(H)
    exact = np.linalg.solve(H + RIDGE * F * np.eye(8), q)
    n = iterations(H, q, np.zeros(8), F, 1e-2)
    errors = [np.linalg.norm(chebyshev(lambda x: x @ H, q, np.float32(F), RIDGE, m) - exact) for m in (n - 1, n)]
    assert errors[0] > 1e-2 * np.linalg.norm(exact) > errors[1]


@pytest.mark.parametrize("stream", STREAMS)
def test_thirty_iterations_reach_3e_4_and_no_token_needs_much_less(stream):
    found = study(stream, 0.0, dim=32, tokens=64, tolerance=3e-4)
    assert 26 <= found["cold"].min() <= found["cold"].max() <= 30
    assert found["warm"].mean() >= found["cold"].mean() - 1, "with unrelated queries a warm start is none"
    assert found["tight"].mean() <= found["cold"].mean() + 1


def test_it_prints_a_row_a_stream(capsys):
    main(["--dim", "16", "--tokens", "8"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(STREAMS)
