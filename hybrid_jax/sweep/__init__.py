"""Sweeps: a grid, or a list, of overrides over experiment configs; run here or as an array job; one table and one picture.

A sweep's directory holds

    sweep.json        what is swept and how it is evaluated; another sweep in the same directory is refused
    runs/NAME/        each point's working directory (see `experiment`), with its `evaluation/`
    results/NAME.json the outcome of each point; one that failed runs again with the same command
    table.md, results.json, sweep.png
    report.md, report.html, ...  where points are evaluated, the comparison of all of them (see `evaluate.report`)
"""

from hybrid_jax.sweep.collecting import collect
from hybrid_jax.sweep.points import Point, claim, points_of
from hybrid_jax.sweep.running import run_point

__all__ = ["Point", "claim", "collect", "points_of", "run_point"]
