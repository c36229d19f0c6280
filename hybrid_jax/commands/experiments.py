"""`train` and `prime`: run an experiment config."""

from __future__ import annotations

import argparse

from hybrid_jax.commands.options import OVERRIDES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}. {OVERRIDES}"
    parser.add_argument("--workdir", required=True, help="everything the run writes goes here; the same one resumes it")
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", help="steps of every phase to trace for XProf, e.g. 10:12", type=steps_of
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="an ml_collections config, e.g. configs/prime_tiny.py:GKA")


def steps_of(text: str) -> tuple[int, int]:
    """`FIRST:LAST`.

    Raises:
      ArgumentTypeError: it is not that.
    """
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"must be FIRST:LAST, e.g. 10:12, got {text!r}")
    return int(first), int(last)


def run(args: argparse.Namespace) -> None:
    from hybrid_jax.experiment import run_experiment
    from hybrid_jax.fields import load_experiment_config
    from hybrid_jax.parallel.distributed import say

    out = run_experiment(load_experiment_config([f"--config={args.config}", *args.overrides]), args.workdir, args.profile)
    say(f"model: {out}")
