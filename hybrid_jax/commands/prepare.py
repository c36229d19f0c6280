"""`prepare`: tokenize a source ahead of time, in parallel; the same command goes on after a crash."""

from __future__ import annotations

import argparse

from hybrid_jax.commands.options import directory, integer, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="stdlib, a file (.jsonl, .parquet, .arrow, text), a folder of them, hf:NAME[:SPLIT]")
    parser.add_argument("out", help="the directory to make, or to finish")
    parser.add_argument("--tokenizer", required=True, type=directory, help="a model directory")
    parser.add_argument("--workers", type=integer(minimum=1), default=1, help="processes per host")
    parser.add_argument(
        "--held-out", type=number(minimum=0, below=100), default=5.0, help="percent of the documents kept for evaluation"
    )
    parser.add_argument("--skip-bad", action="store_true", help="count unreadable records instead of ending at the first")
    parser.add_argument(
        "--replace-invalid", action="store_true", help="put U+FFFD in place of bytes that are not UTF-8, and count them"
    )


def run(args: argparse.Namespace) -> None:
    from hybrid_jax.convert import read_model_config
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer
    from hybrid_jax.data.prepare import prepare
    from hybrid_jax.data.tokens import notes
    from hybrid_jax.parallel.distributed import say

    config = read_model_config(args.tokenizer)
    check_tokenizer_fits(load_tokenizer(args.tokenizer), config.vocab_size, args.tokenizer)
    index = prepare(
        args.source,
        args.out,
        args.tokenizer,
        eos_token_id=config.extra.get("eos_token_id"),
        workers=args.workers,
        held_out_percent=args.held_out,
        skip_bad=args.skip_bad,
        replace_invalid=args.replace_invalid,
    )
    train, held_out = index["train"], index["held_out"]
    say(
        f"{args.out}: {train['tokens']:,} tokens of {train['documents']:,} documents to train, "
        f"{held_out['tokens']:,} of {held_out['documents']:,} held out, {len(index['shards'])} shards"
    )
    if index["bad"]:
        first = next(s["first_bad"][0] for s in index["shards"] if s["first_bad"])
        say(f"{index['bad']:,} records could not be read, the first: {first}")
    for note in notes(index["counts"]):
        say(note)
