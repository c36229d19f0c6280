"""`hybrid-jax COMMAND`: the table of commands, and errors without tracebacks.

Nothing here or at the top of a command's module imports JAX or another large library: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import traceback
from typing import Protocol, cast

from hybrid_jax.commands.options import Parser
from hybrid_jax.commands.quiet import silence_libraries
from hybrid_jax.stopped import EXIT_CODE, Stopped, Terminable


class CommandModule(Protocol):
    """The module of a command. At its top it imports no large library; `run` does."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Adds the command's arguments."""

    def run(self, args: argparse.Namespace, /) -> None:
        """Does the work, or raises one of `EXPECTED` with a message for the user."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One row of `COMMANDS`.

    Args:
      module: name of its module in `hybrid_jax.commands`, or the full path of a module of another package; see `CommandModule`.
      summary: what the command does, for `--help`.
      example: arguments of a useful call, for `--help`.
      job: whether the processes of a job run the command together. Then `jax.distributed` is started first, a process that
        fails ends the others, and compiled programs are kept on disk (`commands.compiled`).
      overrides: whether the command takes `--config.a.b=VALUE`; they arrive as `args.overrides`.
      resumable: whether the command, given again after Ctrl-C or SIGTERM, continues.
    """

    module: str
    summary: str
    example: str
    job: bool = False
    overrides: bool = False
    resumable: bool = False


COMMANDS = {
    "check": Command(
        "check",
        "find out whether everything is right on this machine or pod, and how fast: the first command on new hardware",
        "--out runs/check",
        job=True,
    ),
    "convert": Command(
        "convert",
        "convert a Transformer directory into a hybrid one (stage 0), copy it, or prove that it is read as it is",
        "launch/tiny_qwen3 hybrid --pattern '*-GKA-*-GKA-*-GKA-*-GKA'",
    ),
    "export": Command(
        "export",
        "write a run's model, or a model directory, as a clean Hugging Face directory",
        "runs/mine out --dtype bfloat16",
    ),
    "prepare": Command(
        "prepare",
        "tokenize text or conversations ahead of time",
        "conversations.jsonl data/instruct --tokenizer Qwen3-8B --workers 16",
        job=True,
        resumable=True,
    ),
    "select": Command(
        "select",
        "rank the layers and print a pattern",
        "Qwen3-0.6B --mixer GKA --fraction 0.5 --text my_text",
        job=True,
    ),
    "prime": Command(
        "experiments",
        "run a priming config: select, initialize, align, post-train",
        "--config=configs/prime_tiny.py:GKA --workdir=runs/mine --config.phases.align.steps=200",
        job=True,
        overrides=True,
        resumable=True,
    ),
    "train": Command(
        "experiments",
        "run a training config",
        "--config=configs/source_tiny_qwen3.py --workdir=runs/source",
        job=True,
        overrides=True,
        resumable=True,
    ),
    "plan": Command(
        "plan",
        "print what a job needs on a TPU slice or on GPUs, compiled ahead of time",
        "--source Qwen/Qwen3-8B --pattern GKA:0.5 --topology v5p:4x4x4 --seq-len 131072 --program align",
        overrides=True,
    ),
    "cache-teacher": Command(
        "cache_teacher",
        "write a teacher's top-k tokens to files, to distill from",
        "--config=my_config.py --phase distil --k 64",
        job=True,
        overrides=True,
        resumable=True,
    ),
    "sweep": Command(
        "sweep",
        "run a grid or list of overrides over configs and collect the results",
        "--config=configs/sweep_tiny.py --out runs/sweep",
        resumable=True,
    ),
    "evaluate": Command(
        "evaluate",
        "measure models and runs by instruments: table, report, pictures",
        "--model source=launch/tiny_qwen3 --run mine=runs/mine --out runs/report",
        job=True,
        overrides=True,
        resumable=True,
    ),
    "analyze": Command(
        "analyze",
        "find the heads of models that retrieve: tables and pictures of layer by head",
        "heads --model source=launch/tiny_qwen3 --out runs/heads",
        job=True,
        overrides=True,
        resumable=True,
    ),
    "lm-eval": Command(
        "lm_eval",
        "measure a model by tasks of the lm-evaluation-harness",
        "launch/tiny_qwen3 --tasks lambada_openai,arc_easy --limit 100 --out runs/lm_eval",
    ),
    "generate": Command(
        "generate",
        "continue a prompt, or answer a file of prompts",
        "launch/tiny_qwen3 'def main():'",
        resumable=True,
    ),
}
EXPECTED = (ValueError, OSError, NotImplementedError, FloatingPointError)


def _exit_codes() -> str:
    """Returns the exit codes in words, for `--help`; of the commands in the table now, also of those that were added."""
    *resumable, last = [name for name, command in COMMANDS.items() if command.resumable]
    return (
        f"exit codes: 0 done; 1 failed, with a message; 2 wrong options; {EXIT_CODE} stopped by Ctrl-C or SIGTERM\n"
        f"({', '.join(resumable)} and {last} continue when the same command is given again)"
    )


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of everything, and that of each command."""
    exit_codes = _exit_codes()
    parser = Parser(prog="hybrid-jax", description="Turn pretrained Transformers into hybrids.", epilog=exit_codes)
    subparsers, found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), {}
    for name, command in COMMANDS.items():
        epilog = f"example:\n  hybrid-jax {name} {command.example}\n\n{exit_codes}"
        found[name] = subparsers.add_parser(name, help=command.summary, description=command.summary, epilog=epilog)
        _module(command.module).add_arguments(found[name])
    return parser, found


def _module(name: str) -> CommandModule:
    path = name if "." in name else f"hybrid_jax.commands.{name}"
    return cast(CommandModule, importlib.import_module(path))


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of a command; `overrides` has the `--config.a.b=VALUE`. Wrong ones end the process with code 2."""
    parser, commands = _parsers()
    args, rest = parser.parse_known_args(argv)
    takes_overrides = COMMANDS[args.command].overrides
    args.overrides = [r for r in rest if takes_overrides and r.startswith("--config.")]
    unknown = [r for r in rest if r not in args.overrides]
    if unknown:
        commands[args.command].refuse(unknown)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 a stated error, 3 stopped and, of most commands, resumable.

    A process of a job of several that fails or is stopped alone ends the others too, see `parallel.distributed.end_job`.
    """
    args = read_arguments(argv)
    silence_libraries()
    try:
        if COMMANDS[args.command].job:
            from hybrid_jax.commands.compiled import keep_compiled_programs
            from hybrid_jax.parallel.distributed import initialize

            initialize()
            keep_compiled_programs()
        with Terminable(f"hybrid-jax {args.command}"):
            _module(COMMANDS[args.command].module).run(args)
    except EXPECTED as e:
        return _failed(args.command, " ".join(str(e).split()), 1)
    except KeyboardInterrupt:
        more = "; the same command continues with what is left" if COMMANDS[args.command].resumable else ""
        return _failed(args.command, f"stopped{more}", EXIT_CODE)
    except Stopped as e:  # by every process of a job, after the same step
        print(f"hybrid-jax {args.command}: {e}", file=sys.stderr)
        return EXIT_CODE
    except Exception as e:
        traceback.print_exc()
        return _failed(args.command, f"{type(e).__name__}: {e}", 1)
    return 0


def _failed(command: str, message: str, code: int) -> int:
    """Prints why this process ends; of a job, ends the others."""
    message = f"hybrid-jax {command}: {message}"
    if COMMANDS[command].job:
        from hybrid_jax.parallel.distributed import end_job, in_job

        if in_job():
            end_job(message, code)
    print(message, file=sys.stderr)
    return code
