"""Sweeps: a grid, or a list, of overrides over experiment configs; run here or as an array job; one table and one picture.

A sweep's directory holds

    sweep.json        what is swept and how it is evaluated; another sweep in the same directory is refused
    runs/NAME/        each point's working directory (see `experiment`), with its `evaluation/`
    results/NAME.json the outcome of each point; one that failed runs again with the same command
    table.md, results.json, sweep.png
    report/           where points are evaluated, the comparison of all of them (see `evaluate.report`)
    models/           what was measured of the models beside them
    compiled/         programs that XLA compiled, which the points share (unless JAX_COMPILATION_CACHE_DIR is another place)
"""

from hybrid_jax.sweep.collecting import collect
from hybrid_jax.sweep.points import Point, claim, points_of
from hybrid_jax.sweep.running import measure_models, run_point

__all__ = ["Point", "claim", "collect", "measure_models", "points_of", "run_point"]
