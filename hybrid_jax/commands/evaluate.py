"""`evaluate`: measures models and every stage of runs by a config's instruments; prints a table, writes a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid_jax.commands.options import OVERRIDES, add_gka_iterations, integer

if TYPE_CHECKING:
    from hybrid_jax.evaluate.measured import Target

NEW_TOKENS = 64  # of the continuation of a prompt


def add_arguments(parser: argparse.ArgumentParser, config: str = "configs/evaluate.py") -> None:
    """Adds the command's options; `config` is the default of `--config`."""
    parser.description = f"{parser.description}. {OVERRIDES.replace('phases.align.steps=200', 'instruments.text.rows=16')}"
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="a model; may be repeated")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="a run: every stage of it; may be repeated")
    parser.add_argument("--out", help="directory for the report (report.md, report.html, ...); results there are used again")
    parser.add_argument("--config", default=config, metavar="FILE", help="instruments, data and mesh")
    parser.add_argument("--text", help="in place of the config's data.text: 'stdlib', a .jsonl file, a text file or a folder")
    parser.add_argument("--seq-len", type=integer(minimum=1), help="in place of every instrument's seq_len: tokens per row")
    parser.add_argument("--rows", type=integer(minimum=1), help="in place of every instrument's rows")
    add_gka_iterations(parser, " of every --model and --run, which must have it")
    parser.add_argument("--prompt", help="also show how each model and each run's outcome continue this")


def _check_prompt(prompt: str, outcomes: Sequence[Target]) -> None:
    """Checks that every model can continue the prompt.

    Raises:
      ValueError: it is empty or too long for a model.
    """
    from hybrid_jax.data import load_tokenizer
    from hybrid_jax.data.tokenizer import encode_prompt
    from hybrid_jax.evaluate.evaluation import config_of
    from hybrid_jax.generation import check_prompts

    for target in outcomes:
        check_prompts(config_of(target), [encode_prompt(load_tokenizer(target.path), prompt)], NEW_TOKENS)


def _continued(prompt: str, target: Target) -> str:
    """Returns the prompt with the model's greedy continuation."""
    from hybrid_jax.data import load_tokenizer
    from hybrid_jax.data.tokenizer import decode_continuation, encode_prompt
    from hybrid_jax.evaluate.evaluation import load_target
    from hybrid_jax.generation import generate

    tokenizer = load_tokenizer(target.path)
    ids = encode_prompt(tokenizer, prompt)
    (new,) = generate(load_target(target), [ids], max_new_tokens=NEW_TOKENS)
    return prompt + decode_continuation(tokenizer, ids, new)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the first table, and writes the report."""
    import pathlib

    from rich.console import Console
    from rich.table import Column, Table

    from hybrid_jax.evaluate.evaluation import read_evaluation, targets_of
    from hybrid_jax.evaluate.report import first_table, notes, write_report
    from hybrid_jax.files import check_new_directory, check_writable
    from hybrid_jax.parallel.distributed import is_first, say

    evaluation = read_evaluation(args.config, args.overrides, text=args.text, seq_len=args.seq_len, rows=args.rows)
    targets = targets_of(args.model, args.run, args.gka_iterations, evaluation.models)
    evaluation.check(targets)
    outcomes = list({t.run or t.name: t for t in targets}.values())  # a run's stages come in order: the last one stays
    if args.prompt is not None:
        _check_prompt(args.prompt, outcomes)
    out = pathlib.Path(args.out) if args.out else None
    if out is not None and is_first():
        if not out.is_dir():
            check_new_directory(out)
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out)
    rows = evaluation.run(targets, out)
    if not is_first():
        return
    table = first_table(evaluation, rows)
    drawn = Table(*(Column(name, overflow="fold") for name in table.header))
    for cells in table.rows:
        drawn.add_row(*cells)
    Console(width=None if Console().is_terminal else 160).print(drawn)
    for note in notes(evaluation, rows):
        print(f"note: {note}")
    continuations = [(t.name, _continued(args.prompt, t)) for t in outcomes] if args.prompt is not None else []
    for name, text in continuations:
        print(f"\n{name}:\n{text}")
    if out is not None:
        say(f"report: {write_report(evaluation, rows, out, continuations=continuations)}")
