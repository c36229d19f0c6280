"""`sweep`: run a grid or list of overrides over configs, here or as an array job, and collect the results."""

from __future__ import annotations

import argparse
import os
import pathlib

# What tells a task of an array job which one it is.
ARRAYS = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a sweep config, e.g. configs/sweep_tiny.py")
    parser.add_argument("--out", required=True, help="everything goes here; the same one resumes it")
    parser.add_argument("--index", help="only this point, counted from 0; 'array' for the array job's (Slurm, GKE)")
    parser.add_argument("--collect", action="store_true", help="run nothing: table and picture of what is there")
    parser.add_argument("--list", action="store_true", help="print the points and run nothing")


def check_points(points) -> list:
    """Reads every point's config with its overrides, so that a wrong key or value is found before anything runs; the configs.

    Raises:
      ValueError: names the first wrong point, and how many are wrong.
    """
    from hybrid_jax.experiment_config import Experiment
    from hybrid_jax.fields import load_experiment_config

    wrong, configs = [], []
    for point in points:
        try:
            configs.append(load_experiment_config(point.arguments))
            Experiment.from_config(configs[-1])
        except (ValueError, OSError) as e:
            wrong.append((point.name, e))
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(points)} points cannot run, the first: {wrong[0][0]}: {wrong[0][1]}")
    return configs


def run(args: argparse.Namespace) -> None:
    from hybrid_jax.config_file import load_config
    from hybrid_jax.evaluate.evaluation import read_evaluation, targets_of
    from hybrid_jax.fields import load_experiment_config
    from hybrid_jax.iterations import read_iterations
    from hybrid_jax.stopped import Stopped
    from hybrid_jax.sweep import claim, collect, measure_models, points_of, run_point
    from hybrid_jax.sweep.points import ITERATIONS, MODELS

    config, out = load_config([f"--config={args.config}"]), pathlib.Path(args.out)
    config = config.to_dict()
    points = points_of(config)
    configs = [load_experiment_config(p.arguments) for p in points] if args.collect else check_points(points)
    if args.list:
        print("\n".join(f"{i} {p.name}: {' '.join(p.arguments)}" for i, p in enumerate(points)))
        return
    chosen = points
    if args.index:
        index = args.index
        if index == "array":
            index = next((os.environ[name] for name in ARRAYS if name in os.environ), "")
        if not index.isdecimal() or int(index) >= len(points):
            raise ValueError(
                f"--index {args.index}: expected 0 ... {len(points) - 1}, or 'array' in an array job ({', '.join(ARRAYS)})"
            )
        chosen = [points[int(index)]]
    evaluate = {key: value for key, value in (config.get("evaluate") or {}).items() if value is not None}
    evaluation = instruments = None
    if evaluate:
        options = {key: value for key, value in evaluate.items() if key not in ("config", MODELS, ITERATIONS)}
        file = evaluate.get("config", "configs/evaluate.py")
        evaluation, instruments = read_evaluation(file, **options), load_config([f"--config={file}"])
        if evaluation.models:
            raise ValueError(
                f"{file} has models of its own, which a sweep does not measure; name them in the sweep's evaluate.models"
            )
        if ITERATIONS in evaluate:
            read_iterations(f"sweep.evaluate.{ITERATIONS}", evaluate[ITERATIONS])
        if models := evaluate.get(MODELS):
            evaluation.check(targets_of([f"{name}={path}" for name, path in models.items()], ()))
    claim(out, points, configs, evaluate, instruments)
    results = {}
    if evaluate.get(MODELS) and points[0] in chosen and not args.collect:
        status, error = measure_models(out, evaluate)
        if status != "done":
            raise Stopped("measuring was stopped; the same command resumes the sweep") if status == "stopped" else ValueError(error)
    for n, point in enumerate(chosen if not args.collect else (), start=1):
        print(f"sweep: {n} of {len(chosen)}, {point.name}", flush=True)
        results[point.name] = run_point(point, out, evaluate)
        if results[point.name]["status"] == "stopped":
            raise Stopped(f"{point.name} was stopped; the same command resumes the sweep")
    rows = collect(out, points, results, evaluation)
    failed = [r for r in results.values() if r["status"] == "failed"]
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} points failed, the first: {failed[0]['name']}: {failed[0]['error']}")
