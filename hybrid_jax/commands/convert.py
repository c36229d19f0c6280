"""`convert SRC OUT [--pattern P]`."""

from __future__ import annotations

import argparse

from hybrid_jax.commands.options import directory, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=directory, help="a Hugging Face directory, or a hybrid one")
    parser.add_argument("out", help="the directory to make")
    parser.add_argument("--pattern", help="one symbol per layer, e.g. '*-GKA-*-GKA'; without it the model is copied")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters; default: the source's")
    parser.add_argument("--seed", type=integer(minimum=0), default=0, help="of what the pattern initializes afresh")


def run(args: argparse.Namespace) -> None:
    from hybrid_jax.convert import load_model, save_model
    from hybrid_jax.families import plugin_notes
    from hybrid_jax.files import check_new_directory

    check_new_directory(args.out)
    model = load_model(args.source, pattern=args.pattern, dtype=args.dtype, seed=args.seed)
    save_model(model, args.out, tokenizer_from=args.source)
    print(f"{args.out}: {model.config.family}, {model.config.pattern}")
    for note in plugin_notes(model.config):
        print(note)
