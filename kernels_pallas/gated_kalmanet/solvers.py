"""The iterations that solve (H + lambda I) x = q, by name, and how the kernels round in them."""

from __future__ import annotations

from kernels_pallas.gated_kalmanet.chebyshev import chebyshev
from kernels_pallas.gated_kalmanet.conjugate_gradients import conjugate_gradients

SOLVERS = {"chebyshev": chebyshev, "cg": conjugate_gradients}
ENOUGH = {"chebyshev": 24, "cg": 16}  # iterations that damp the roundings of the fast schedule below 1e-3
WIDE = {"chebyshev": {"fast": 8, "accurate": 22}, "cg": {"fast": 6, "accurate": 18}}
STEP_PARTS = {"chebyshev": 2, "cg": 1}  # of "accurate": the lengths of conjugate gradients' steps fit the rounded directions
SMALLEST = 2.0**-126  # of float32's normal numbers
LEAST_RIDGE = 1e-4  # for "cg": with less, roundings of float32 make its steps diverge


def check_solver(op: str, solver: str, ridge_strength: float) -> None:
    """Checks the name of a solver, and that it converges with this ridge.

    Raises:
      ValueError: it is unknown, or the ridge is too small for it.
    """
    if solver not in SOLVERS:
        raise ValueError(f"{op}: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "cg" and ridge_strength < LEAST_RIDGE:
        raise ValueError(f"{op}: solver 'cg' needs a ridge_strength of at least {LEAST_RIDGE}, got {ridge_strength!r}")


def unit_of(solver: str, ridge_strength: float) -> float:
    """Returns by what multiple of F = |H|_F the kernels divide the equation: lambda + F / 2 for "chebyshev", lambda for "cg"."""
    return ridge_strength + (0.5 if solver == "chebyshev" else 0.0)


def schedule_for(solver: str, precision: str, num_iter: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Returns how many bf16 parts the kernels use (see `tpu_solve.py`).

    A rounding is damped by the iterations after it, so with fewer than `ENOUGH` of them everything is in two parts.

    Returns:
      The number of parts of the step d, and (iterations, parts of the matrix) pairs in order; later iterations use one part.
    """
    if num_iter < ENOUGH[solver]:
        return 2, ((num_iter, 2),)
    return STEP_PARTS[solver] if precision == "accurate" else 1, ((WIDE[solver][precision], 2),)
