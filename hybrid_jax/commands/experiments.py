"""`train` and `prime`: run an experiment config."""

from __future__ import annotations

import argparse
import pathlib
import sys
from unittest import mock

from absl import flags
from ml_collections import ConfigDict, config_flags


def load_config(arguments: list[str]) -> ConfigDict:
    """Reads `--config=FILE` and its `--config.a.b=value` overrides.

    Raises:
      ValueError: no such file, no such field, or a value of another type.
    """
    file = next((a.removeprefix("--config=").partition(":")[0] for a in arguments if a.startswith("--config=")), "")
    if not pathlib.Path(file).is_file():
        raise ValueError(f"no config file at {file!r}; configs/ has examples")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["hybrid-jax", *arguments]
    try:
        with mock.patch.object(sys, "argv", argv):  # where config_flags looks for the overrides
            values(argv)
        return values.config
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as e:
        # an error inside the config file comes with its whole traceback; its last line says it
        raise ValueError(str(e).strip().splitlines()[-1] if "Traceback" in str(e) else str(e)) from None


def add_arguments(parser: argparse.ArgumentParser):
    parser.epilog = "Fields of the config are overridden by --config.a.b=value."
    parser.add_argument("--workdir", required=True, help="everything the run writes goes here; the same one resumes it")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="steps of every phase to trace for XProf, e.g. 10:12")
    parser.add_argument("--config", required=True, metavar="FILE", help="an ml_collections config, e.g. configs/prime_tiny.py:GKA")


def steps_of(text: str | None) -> tuple[int, int] | None:
    """`FIRST:LAST`.

    Raises:
      ValueError: it is not that.
    """
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise ValueError(f"--profile {text!r}: expected FIRST:LAST, e.g. 10:12")
    return int(first), int(last)


def run(args: argparse.Namespace):
    from hybrid_jax.experiment import run_experiment

    out = run_experiment(load_config([f"--config={args.config}", *args.overrides]), args.workdir, steps_of(args.profile))
    print(f"model: {out}")
