"""`analyze heads`: which heads of a model retrieve; `evaluate` with the config of the analysis."""

from __future__ import annotations

import argparse

from hybrid_jax.commands import evaluate

CONFIG = "configs/analyze_heads.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("heads",), help="heads: what is lost without each head, and how much it gathers facts and aggregates them"
    )
    evaluate.add_arguments(parser, config=CONFIG)


def run(args: argparse.Namespace) -> None:
    evaluate.run(args)
