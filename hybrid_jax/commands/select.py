"""`select SRC`: rank the layers by what converting each costs, and print a pattern."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from hybrid_jax.commands.options import directory, integer, number
from hybrid_jax.selection.scorers import DEFAULT_SCORER, SCORERS

if TYPE_CHECKING:
    from hybrid_jax.selection.select import Selection

NAMED = ("window", "rows", "seq_len")  # options of scorers that are options of the command too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("source", type=directory, help="a Hugging Face directory with its tokenizer")
    parser.add_argument("--mixer", default="GKA", help="symbol of the mixer in the printed pattern")
    parser.add_argument("--fraction", type=number(above=0, maximum=1), default=0.5, help="fraction of layers to convert")
    parser.add_argument("--scorer", choices=sorted(SCORERS), default=DEFAULT_SCORER, help="what measures a layer's cost")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the scorer, e.g. --scorer score_file --option path=scores.csv; may be repeated",
    )
    parser.add_argument(
        "--window", type=integer(minimum=1), help="keys that sliding-window attention sees while scoring (default: 16)"
    )
    parser.add_argument(
        "--rows", type=integer(minimum=1), help="held-out rows of text to score on, and as many of retrieval (default: 16)"
    )
    parser.add_argument("--seq-len", type=integer(minimum=1), help="tokens per row (default: 256)")
    parser.add_argument("--text", default="stdlib", help="'stdlib', a .jsonl file, a text file or a folder")
    parser.add_argument("--mesh", default="", help="axes of devices, e.g. fsdp=2,seq=4; default: one device")


def _selection(args: argparse.Namespace) -> Selection:
    """Returns the selection that the command line describes."""
    from hybrid_jax.checks import check_known
    from hybrid_jax.config_file import parse_value
    from hybrid_jax.selection.select import Selection, scorer_options

    defaults, options = scorer_options(args.scorer), {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: expected NAME=VALUE")
        check_known(f"--option of the scorer {args.scorer!r}", [name], defaults)
        options[name] = parse_value(f"--option {name}", value, defaults[name])
    options |= {name: getattr(args, name) for name in NAMED if getattr(args, name) is not None}
    return Selection(args.mixer, args.fraction, args.scorer, options)


def run(args: argparse.Namespace) -> None:
    """Prints the pattern that converts the cheapest layers."""
    import jax.numpy as jnp

    from hybrid_jax.convert import check_model_directory, load_model
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer, read_corpus
    from hybrid_jax.parallel.distributed import say
    from hybrid_jax.parallel.mesh import make_mesh, parse_mesh
    from hybrid_jax.selection.select import pattern_from_scores, score_layers

    config = check_model_directory(args.source)
    check_tokenizer_fits(load_tokenizer(args.source), config.vocab_size, args.source)
    try:
        selection = _selection(args)
        mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
        selection.check(config, mesh)
    except ValueError as e:  # checks name a config's fields, the user has given options
        raise ValueError(re.sub(r"\bselect\.(\w+)", lambda m: f"--{m[1].replace('_', '-')}", str(e))) from None
    model = load_model(args.source, dtype=jnp.float32, mesh=mesh)
    corpus = read_corpus({"text": args.text}, args.source, model.config.extra.get("eos_token_id"))
    say(pattern_from_scores(score_layers(model, corpus, selection, mesh).per_layer(), args.mixer, args.fraction))
