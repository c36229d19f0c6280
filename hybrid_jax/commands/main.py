"""`hybrid-jax COMMAND`: the table of commands, and errors without tracebacks."""

from __future__ import annotations

import argparse
import importlib
import sys

from hybrid_jax.stopped import Stopped

# Command -> (module with `add_arguments` and `run`, what it does).
COMMANDS = {
    "convert": ("convert", "a Transformer directory into a hybrid one (stage 0), or a copy"),
    "export": ("export", "a run's outcome or a model directory to a clean Hugging Face directory"),
    "prepare": ("prepare", "tokenise text or conversations ahead of time"),
    "select": ("select", "rank the layers and print a pattern"),
    "prime": ("experiments", "run a priming config: select, initialise, align, post-train"),
    "train": ("experiments", "run a training config"),
    "plan": ("plan", "what a job needs on a TPU slice or GPUs, compiled ahead of time"),
    "cache-teacher": ("cache_teacher", "keep a teacher's likeliest tokens, to distil from"),
    "sweep": ("sweep", "run a grid or list of overrides over configs and collect the results"),
    "evaluate": ("evaluate", "held-out loss and recall of models and runs: table, report, picture"),
    "generate": ("generate", "continue a prompt"),
}
SPREAD = {"prime", "train", "cache-teacher"}  # commands that run as one job of several processes
CONFIGURED = {"experiments", "cache_teacher"}  # modules that take --config.a.b=value
EXPECTED = (ValueError, OSError, NotImplementedError, FloatingPointError)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 a stated error, 3 stopped and resumable."""
    parser = argparse.ArgumentParser(prog="hybrid-jax", description="Turn pretrained Transformers into hybrids.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        importlib.import_module(f"hybrid_jax.commands.{module}").add_arguments(subparser)
    args, rest = parser.parse_known_args(argv)
    if rest and not (COMMANDS[args.command][0] in CONFIGURED and all(r.startswith("--config.") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    module = importlib.import_module(f"hybrid_jax.commands.{COMMANDS[args.command][0]}")
    args.overrides = rest
    try:
        if args.command in SPREAD:
            from hybrid_jax.parallel.distributed import initialize

            initialize()
        module.run(args)
    except EXPECTED as e:
        print(f"hybrid-jax {args.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except Stopped as e:
        print(f"hybrid-jax {args.command}: {e}", file=sys.stderr)
        return 3
    return 0
