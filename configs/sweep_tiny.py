"""Four small primings side by side, on a CPU in a quarter of an hour: two mixers, two learning rates of the alignment.

    python -m hybrid_jax sweep --config=configs/sweep_tiny.py --out runs/sweep

Expect runs/sweep/table.md with four rows, runs/sweep/sweep.png, and the comparison in runs/sweep/report/report.html. The same
command goes on where it was stopped; as an array job, `./launch/slurm.sh`'s way, each task runs `sweep ... --index array`, and
`sweep ... --collect` makes the table.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "configs": ("configs/prime_tiny.py:GDN", "configs/prime_tiny.py:M2"),
            "grid": {"phases": {"align": {"learning_rate": (2e-3, 5e-3)}}},
            "points": ({"phases": {"align": {"steps": 60}, "train": {"steps": 20}}},),
            "evaluate": {"config": "configs/evaluate_tiny.py", "rows": 8},
        }
    )
