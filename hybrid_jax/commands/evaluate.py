"""`evaluate`: measures models and every stage of runs, prints one table, writes report.md and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hybrid_jax.commands.options import integer
from hybrid_jax.files import find_shipped, read_json

if TYPE_CHECKING:
    from hybrid_jax.evaluate.evaluation_report import Row

NEW_TOKENS = 64  # of the continuation of a prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="a model; may be repeated")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="a run: every stage of it; may be repeated")
    parser.add_argument("--out", help="directory for report.md, recovery.png and results.json; results there are reused")
    parser.add_argument("--text", default="stdlib", help="'stdlib', a .jsonl file, a text file or a folder")
    parser.add_argument("--seq-len", type=integer(minimum=1), default=256, help="tokens per row")
    parser.add_argument(
        "--rows", type=integer(minimum=1), default=128, help="rows of held-out text; a quarter as many of retrieval"
    )
    parser.add_argument("--prompt", help="also show how each model and each run's outcome continue this")


def _named(text: str) -> tuple[str, pathlib.Path]:
    """Splits NAME=DIR."""
    name, _, path = text.partition("=")
    if not path:
        raise ValueError(f"expected NAME=DIR, got {text!r}")
    return name, find_shipped(path)


class Measured(NamedTuple):
    """A model to measure.

    Attributes:
      name: of its row in the table.
      path: its directory.
      run, stage, source: for a stage of a run, the run's name, the stage's number and the directory of the run's source.
    """

    name: str
    path: pathlib.Path
    run: str = ""
    stage: int = 0
    source: str = ""


def _to_measure(args: argparse.Namespace) -> list[Measured]:
    """Returns the models that the command line names, in its order.

    Raises:
      ValueError: there is nothing to measure, a name has no directory, or two models have the same name.
      FileNotFoundError: a run has no stages.
    """
    models, runs = [_named(text) for text in args.model], [_named(text) for text in args.run]
    names = [name for name, _ in (*models, *runs)]
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice:
        raise ValueError(f"the name {twice!r} is given twice; give every --model and --run a name of its own")
    found = [Measured(name, path) for name, path in models]
    for run, path in runs:
        stages = sorted((path / "stages").glob("[0-9]*_*"))
        if not stages:
            raise FileNotFoundError(f"{path} is not a run: it has no stages")
        source = read_json(path / "config.json").get("source") or ""
        found += [Measured(f"{run} {s.name.partition('_')[2]}", s, run, i, source) for i, s in enumerate(stages)]
    if not found:
        raise ValueError("give at least one --model NAME=DIR or --run NAME=DIR")
    return found


def _check(args: argparse.Namespace, todo: list[Measured]) -> None:
    """Checks, before anything is measured, that every tokenizer, row and prompt fits its model.

    A run's rows must fit its last stage; earlier ones are measured beyond their positions, too, if a phase raised them.

    Raises:
      ValueError: one does not.
    """
    from hybrid_jax.convert import check_model_directory
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer
    from hybrid_jax.data.tokenizer import encode_prompt
    from hybrid_jax.evaluate.measures import BLOCK, PAIRS
    from hybrid_jax.generation import check_prompts

    if args.seq_len < BLOCK:
        raise ValueError(f"--seq-len must be at least {BLOCK}, the tokens of a retrieval of {PAIRS} pairs, got {args.seq_len}")
    last = {m.run or m.name: m for m in todo}
    for m in todo:
        config, tokenizer = check_model_directory(m.path), load_tokenizer(m.path)
        check_tokenizer_fits(tokenizer, config.vocab_size, m.path)
        if m is not last[m.run or m.name]:
            continue
        if args.seq_len > config.max_position_embeddings:
            raise ValueError(
                f"--seq-len {args.seq_len:,} is more than the max_position_embeddings of {m.name!r} ({m.path}), "
                f"{config.max_position_embeddings:,}"
            )
        if args.prompt is not None:
            check_prompts(config, [encode_prompt(tokenizer, args.prompt)], NEW_TOKENS)


def _fingerprint(path: pathlib.Path, args: argparse.Namespace) -> dict:
    """Returns what a result depends on, by name; a stored result is reused only if all of it is the same."""
    from hybrid_jax.data.corpus import source_stamp
    from hybrid_jax.files import file_hash

    found = {p.name: file_hash(p) for p in sorted(path.glob("*.json"))}
    found |= {"weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(path.glob("*.safetensors"))]}
    found |= {"path": str(path.absolute()), "--text": args.text, "the text": source_stamp(args.text)}
    found |= {"--seq-len": args.seq_len, "--rows": args.rows}
    return json.loads(json.dumps(found))


def _continuations(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """Returns the Markdown of how each model, and the last stage of each run, continues the prompt."""
    import jax.numpy as jnp

    from hybrid_jax.convert import load_model
    from hybrid_jax.data import load_tokenizer
    from hybrid_jax.data.tokenizer import decode_continuation, encode_prompt
    from hybrid_jax.generation import generate

    last = {r.run or r.name: r for r in rows}  # a run's rows come in order: the last one stays
    parts = []
    for row in last.values():
        tokenizer = load_tokenizer(row.path)
        model = load_model(row.path, dtype=jnp.float32)
        ids = encode_prompt(tokenizer, args.prompt)
        (new,) = generate(model, [ids], max_new_tokens=NEW_TOKENS)
        parts.append(f"**{row.name}**\n\n```python\n{args.prompt}{decode_continuation(tokenizer, ids, new)}\n```")
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> None:
    import jax.numpy as jnp
    from rich.console import Console
    from rich.table import Column, Table

    from hybrid_jax.convert import load_model
    from hybrid_jax.data import read_corpus
    from hybrid_jax.data.tokens import Encoder
    from hybrid_jax.evaluate.evaluation_report import HEADER, Row, draw_recovery, markdown_table, notes, table_cells
    from hybrid_jax.evaluate.measures import retrieval_loss_and_accuracy, text_loss
    from hybrid_jax.files import check_new_directory, check_writable, write_text
    from hybrid_jax.parallel.distributed import say
    from hybrid_jax.progress import progress_bar

    todo = _to_measure(args)
    _check(args, todo)
    out = pathlib.Path(args.out) if args.out else None
    known = {}
    if out is not None:
        if not out.is_dir():
            check_new_directory(out)
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out)
        if (out / "results.json").exists():
            known = {r["row"]["path"]: r for r in json.loads((out / "results.json").read_text())}
    say(f"held-out text: {'the standard library of this Python' if args.text == 'stdlib' else args.text}")
    records, corpora = [], {}
    for name, path, group, stage, source in progress_bar(todo, name="evaluate", unit="model"):
        fingerprint = _fingerprint(path, args)
        old = known.get(str(path))
        changed = [k for k in fingerprint if not old or old["fingerprint"].get(k) != fingerprint[k]]
        if old and not changed:
            row = Row(**{**old["row"], "name": name, "run": group, "stage": stage, "source": source})
        else:
            if old:
                say(f"{name}: measured again, changed since the stored result: {', '.join(changed)}")
            model = load_model(path, dtype=jnp.float32)
            eos = model.config.extra.get("eos_token_id")
            encoding = Encoder(path, eos).identity  # each model reads the text by its own tokenizer
            key = json.dumps(encoding, sort_keys=True)
            if key not in corpora:
                corpora[key] = read_corpus({"text": args.text}, path, eos)
            loss = text_loss(model, corpora[key], args.seq_len, args.rows)
            text_rows = min(args.rows, len(corpora[key].held_out_rows(args.seq_len)))
            accuracy = retrieval_loss_and_accuracy(model, corpora[key], args.seq_len, max(args.rows // 4, 1))[1]
            tokenizer = encoding["tokenizer"][:12]
            row = Row(name, str(path), model.config.pattern, loss, accuracy, group, stage, tokenizer, source, text_rows)
        records.append({"row": dataclasses.asdict(row), "fingerprint": fingerprint})
        if out is not None:
            waiting = [known[str(m.path)] for m in todo[len(records) :] if str(m.path) in known]  # if this is stopped before them
            write_text(out / "results.json", json.dumps([*records, *waiting], indent=2) + "\n")
    rows = [Row(**r["row"]) for r in records]

    table = Table(*(Column(name, overflow="fold") for name in HEADER))
    for cells in table_cells(rows):
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 120).print(table)
    for note in notes(rows, args.rows):
        print(f"note: {note}")
    if args.prompt is not None:
        text = _continuations(args, rows)
        print(text)
    if out is not None:
        draw_recovery(rows, out / "recovery.png")
        parts = ["# Recovery", markdown_table(rows), *notes(rows, args.rows), "![recovery](recovery.png)"]
        if args.prompt is not None:
            parts += ["## Continuations (greedy)", text]
        write_text(out / "report.md", "\n\n".join(parts) + "\n")
        print(f"report: {out / 'report.md'}")
