"""How many iterations Gated KalmaNet's solve needs, and what would shorten it: `python -m kernels_pallas.lab.convergence`.

Of a stream of 512 tokens, each token's solve in float64 is iterated until x is within a tolerance of the exact solution:

    cold      as the kernels do it: from x = s q, the spectrum bounded by |H|_F
    warm      from the last token's solution (what a decode step could keep)
    tight     cold, with the spectrum bounded by |H^2|_F^(1/2): H^2 costs a token as much as K iterations

`min` and `max` over the tokens say what stopping by the residual could save: a chunk stops with its slowest token.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from kernels_pallas.recorded import recorded, without_out

RIDGE = 0.02
STREAMS = {  # correlation of a token's key with the one before, log decay
    "independent keys, slow decay": (0.0, -0.001),
    "independent keys, fast decay": (0.0, -0.1),
    "correlated keys": (0.95, -0.02),
}


def unit_walk(rng, tokens: int, dim: int, correlation: float) -> np.ndarray:
    """Unit vectors [tokens, dim], each correlated with the one before."""
    x = rng.normal(size=(tokens, dim))
    for t in range(1, tokens):
        x[t] = correlation * x[t - 1] + np.sqrt(1 - correlation**2) * x[t]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def iterations(H, q, start, bound: float, tolerance: float, most: int = 100) -> int:
    """Chebyshev iterations until |x - x*| < tolerance |x*|, for (H + lambda I) x* = q with eigenvalues of H up to `bound`."""
    ridge = RIDGE * np.linalg.norm(H)
    A = H + ridge * np.eye(len(q))
    exact = np.linalg.solve(A, q)
    s, r, omega = 1 / (ridge + bound / 2), (bound / (2 * ridge + bound) / 2) ** 2, 2.0
    x, previous = start + s * (q - A @ start), start
    for done in range(most):
        if np.linalg.norm(x - exact) < tolerance * np.linalg.norm(exact):
            return done
        omega = 1 / (1 - r * omega)
        x, previous = omega * (x + s * (q - A @ x)) - (omega - 1) * previous, x
    return most


def study(stream: str, query_correlation: float, *, dim: int, tokens: int, tolerance: float) -> dict[str, np.ndarray]:
    """Iterations of the last half of a stream's tokens, by way of starting."""
    rng = np.random.default_rng(0)
    key_correlation, log_decay = STREAMS[stream]
    keys, queries = unit_walk(rng, tokens, dim, key_correlation), unit_walk(rng, tokens, dim, query_correlation)
    H, last, found = np.zeros((dim, dim)), np.zeros(dim), {"cold": [], "warm": [], "tight": []}
    for t, (k, q) in enumerate(zip(keys, queries, strict=True)):
        H = np.exp(log_decay) * H + np.outer(k, k)
        frobenius = float(np.linalg.norm(H))
        if t >= tokens // 2:
            zero, squared = np.zeros(dim), float(np.sqrt(np.linalg.norm(H @ H)))
            found["cold"].append(iterations(H, q, zero, frobenius, tolerance))
            found["warm"].append(iterations(H, q, last, frobenius, tolerance))
            found["tight"].append(iterations(H, q, zero, squared, tolerance))
        last = np.linalg.solve(H + RIDGE * frobenius * np.eye(dim), q)
    return {way: np.asarray(n) for way, n in found.items()}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.lab.convergence")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=3e-4, help="what 30 iterations reach")
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args(argv)
    with recorded(options.out, "kernels_pallas.lab.convergence", without_out(sys.argv[1:] if argv is None else argv)):
        print_iterations(options.dim, options.tokens, options.tolerance)


def print_iterations(dim: int, tokens: int, tolerance: float) -> None:
    """Prints the mean, least and most iterations of every stream by way of starting; see `study`."""
    print(f"{'stream':30} {'queries':>12}   " + "   ".join(f"{way:>6} min max" for way in ("cold", "warm", "tight")))
    for stream in STREAMS:
        for correlation in (0.0, 0.9):
            found = study(stream, correlation, dim=dim, tokens=tokens, tolerance=tolerance)
            cells = "   ".join(f"{n.mean():6.1f} {n.min():3} {n.max():3}" for n in found.values())
            print(f"{stream:30} {f'correlated {correlation}':>12}   {cells}", flush=True)


if __name__ == "__main__":
    main()
