"""`select SRC`: rank the layers by what converting each costs, and print a pattern."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybrid_jax.commands.options import directory, integer, number
from hybrid_jax.selection import BUDGETS
from hybrid_jax.selection.scorers import DEFAULT_SCORER, SCORERS

if TYPE_CHECKING:
    from hybrid_jax.selection.scorers.contract import Scorer
    from hybrid_jax.selection.select import Selection

NAMED = ("window", "rows", "seq_len")  # options of scorers that are options of the command too
ALL = "all"  # of the scorers, in --compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("source", type=directory, help="a Hugging Face directory with its tokenizer")
    parser.add_argument("--mixer", default="GKA", help="symbol of the mixer in the printed pattern")
    fraction = number(above=0, maximum=1)
    parser.add_argument("--fraction", type=fraction, help="fraction of layers, or of heads, to convert (default: 0.5)")
    parser.add_argument(
        "--budget",
        choices=BUDGETS,
        default=BUDGETS[0],
        help="convert a fraction of the layers, or of the heads (by a scorer of heads), or as few layers as fit in --state-bytes",
    )
    parser.add_argument("--state-bytes", type=integer(minimum=1), default=0, help="bytes that a sequence of --tokens may hold")
    parser.add_argument("--tokens", type=integer(minimum=1), default=0, help="tokens of the sequence of --state-bytes")
    parser.add_argument("--scorer", choices=sorted(SCORERS), default=DEFAULT_SCORER, help="what measures a layer's cost")
    parser.add_argument(
        "--compare",
        nargs="?",
        const=ALL,
        metavar="SCORERS",
        help=f"instead of choosing, run several scorers (names joined by commas; default: all) and {DEFAULT_SCORER}; print "
        "what each costs, how far it agrees with that one, and its pattern",
    )
    parser.add_argument("--out", help="directory for the comparison: Markdown, CSV, a picture of the ranks")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the scorer, e.g. --scorer score_file --option path=scores.csv; may be repeated. With --compare it is an "
        "option of every scorer that has one of that name",
    )
    parser.add_argument(
        "--window", type=integer(minimum=1), help="keys that sliding-window attention sees while scoring (default: 16)"
    )
    parser.add_argument(
        "--rows", type=integer(minimum=1), help="rows of training text to score on, and as many of retrieval (default: 16)"
    )
    parser.add_argument("--seq-len", type=integer(minimum=1), help="tokens per row (default: 256)")
    parser.add_argument("--text", default="stdlib", help="'stdlib', a .jsonl file, a text file or a folder")
    parser.add_argument("--mesh", default="", help="axes of devices, e.g. fsdp=2,seq=4; default: one device")


def _given(args: argparse.Namespace) -> dict[str, str]:
    """Returns the texts of --option by name.

    Raises:
      ValueError: one is not NAME=VALUE.
    """
    for text in args.option:
        if "=" not in text:
            raise ValueError(f"--option {text}: expected NAME=VALUE")
    return dict(text.split("=", 1) for text in args.option)


def _options(given: Mapping[str, str], args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of one scorer, with these defaults, that the command line gives."""
    from hybrid_jax.config_file import parse_value

    found = {name: parse_value(f"--option {name}", text, defaults[name]) for name, text in given.items()}
    return found | {name: getattr(args, name) for name in NAMED if getattr(args, name) is not None}


def _fraction(args: argparse.Namespace) -> float:
    """Returns the fraction that is converted, of which the budget `bytes` takes no notice."""
    return 0.5 if args.fraction is None else args.fraction


def _selection(args: argparse.Namespace) -> Selection:
    """Returns the selection that the command line describes."""
    from hybrid_jax.checks import check_known
    from hybrid_jax.selection.select import Selection, scorer_options

    defaults, given = scorer_options(args.scorer), _given(args)
    check_known(f"--option of the scorer {args.scorer!r}", given, defaults)
    return Selection(
        args.mixer, _fraction(args), args.scorer, _options(given, args, defaults), args.budget, args.state_bytes, args.tokens
    )


def _scorers(args: argparse.Namespace) -> dict[str, Scorer]:
    """Returns the scorers that --compare names, and the published one, each with those of the given options that it has."""
    from hybrid_jax.checks import check_choice, check_known
    from hybrid_jax.selection.select import make_scorer, scorer_options

    given = _given(args)
    named = [name.strip() for name in args.compare.split(",")]
    if ALL in named:  # a scorer that works only with an option of its own is run if that is given
        named = [name for name in SCORERS if name != "score_file" or "path" in given]
    for name in named:
        check_choice("--compare", name, SCORERS)
    names = list(dict.fromkeys((DEFAULT_SCORER, *named)))
    options = {name: scorer_options(name) for name in names}
    check_known("--option of the compared scorers", given, {n for defaults in options.values() for n in defaults})
    found = {}
    for name, defaults in options.items():
        own = {n: text for n, text in given.items() if n in defaults}
        found[name] = make_scorer(name, {n: x for n, x in _options(own, args, defaults).items() if n in defaults})
    return found


def _check(args: argparse.Namespace) -> None:
    """Refuses options that have no effect together."""
    if args.budget == "bytes" and args.fraction is not None:
        raise ValueError("--budget bytes converts as few layers as fit in --state-bytes; leave --fraction out")
    if args.compare is None and args.out is not None:
        raise ValueError("--out is where --compare writes; give both, or none")
    if args.compare is not None and (args.budget != BUDGETS[0] or args.state_bytes or args.tokens):
        raise ValueError(
            "--compare shows patterns of the same --fraction of layers; leave --budget, --state-bytes and --tokens out"
        )
    if args.compare is not None and args.scorer != DEFAULT_SCORER:
        raise ValueError(f"--compare names the scorers itself: --compare {args.scorer}")


def run(args: argparse.Namespace) -> None:
    """Prints the pattern that converts the cheapest layers or heads; or compares scorers."""
    import pathlib

    import jax.numpy as jnp

    from hybrid_jax.convert import check_model_directory, load_model
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer, read_corpus
    from hybrid_jax.files import check_new_directory
    from hybrid_jax.parallel.distributed import is_first, say
    from hybrid_jax.parallel.mesh import make_mesh, parse_mesh
    from hybrid_jax.selection.select import Selection, check_scorer, select_pattern

    config = check_model_directory(args.source)
    check_tokenizer_fits(load_tokenizer(args.source), config.vocab_size, args.source)
    scorers: dict[str, Scorer] = {}
    try:
        _check(args)
        mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
        selection = _selection(args) if args.compare is None else Selection(args.mixer, _fraction(args))
        if args.compare is None:
            selection.check(config, mesh)
        else:
            scorers = _scorers(args)
            selection.example(config)
            for scorer in scorers.values():
                check_scorer(scorer, config, mesh)
    except ValueError as e:  # checks name a config's fields, the user has given options
        raise ValueError(re.sub(r"\bselect\.(\w+)", lambda m: f"--{m[1].replace('_', '-')}", str(e))) from None
    if args.out is not None:
        check_new_directory(args.out)
    model = load_model(args.source, dtype=jnp.float32, mesh=mesh)
    corpus = read_corpus({"text": args.text}, args.source, model.config.extra.get("eos_token_id"))
    if not scorers:
        say(select_pattern(model, corpus, selection, mesh)[0])
        return
    from hybrid_jax.selection.compare import NOTES, compare_scorers, comparison_table, write_comparison

    compared = compare_scorers(model, corpus, scorers, args.mixer, _fraction(args), mesh)
    say("\n".join([comparison_table(compared).markdown(), *NOTES]))
    if args.out is not None and is_first():
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        say(f"comparison: {write_comparison(compared, out)}")
