"""`convert SRC [OUT] [--pattern P] [--verify REPORT]`."""

from __future__ import annotations

import argparse
import pathlib

from hybrid_jax.commands.options import directory, integer, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=directory, help="a Hugging Face directory, a hybrid one, or a name on the hub such as Qwen/Qwen3-0.6B"
    )
    parser.add_argument("out", nargs="?", help="the directory to make; may be left out with --verify")
    parser.add_argument("--pattern", help="one symbol per layer, e.g. '*-GKA-*-GKA'; without it the model is copied")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters; default: the source's")
    parser.add_argument(
        "--seed", type=integer(minimum=0, maximum=2**32 - 1), default=0, help="of what the pattern initializes afresh"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory OUT, when the new one is complete")
    parser.add_argument(
        "--verify",
        metavar="REPORT",
        help="first prove that the source is read as it is: a report of every tensor, of the bytes that come back and, where torch "
        "and transformers are installed, of every layer's output; exit code 1 if anything is off",
    )
    parser.add_argument("--tokens", type=integer(minimum=1), help="with --verify: of the sample text (default: 96)")
    parser.add_argument("--tolerance", type=number(above=0), help="with --verify: relative error of outputs (default: 1e-4)")


def run(args: argparse.Namespace) -> None:
    from hybrid_jax.convert import convert_directory
    from hybrid_jax.families import plugin_notes
    from hybrid_jax.files import check_new_directory
    from hybrid_jax.hub import local_model

    for option in ("tolerance", "tokens"):
        if getattr(args, option) is not None and args.verify is None:
            raise ValueError(f"--{option} is that of --verify; give both")
    if args.out is None and args.verify is None:
        raise ValueError("name the directory to make (OUT), or the report of --verify")
    if args.out is None and args.pattern is not None:
        raise ValueError("--pattern converts into OUT; name it")
    if args.out is not None:
        check_new_directory(args.out, args.overwrite, args.source)
    if args.verify is not None:
        check_new_directory(args.verify)
        if args.out is not None and pathlib.Path(args.verify).resolve().is_relative_to(pathlib.Path(args.out).resolve()):
            raise ValueError(f"--verify {args.verify} is, or is in, the output directory {args.out}; give another place")
    args.source = local_model(args.source)
    if args.verify is not None:
        _verify(args)
    if args.out is None:
        return
    pattern = args.pattern
    form = (lambda config: config) if pattern is None else (lambda config: config.with_pattern(pattern))
    config = convert_directory(args.source, args.out, form, dtype=args.dtype, seed=args.seed, overwrite=args.overwrite)
    print(f"{args.out}: {config.family}, {config.pattern}")
    for note in plugin_notes(config):
        print(note)


def _verify(args: argparse.Namespace) -> None:
    """Writes the parity report of the source.

    Raises:
      ValueError: something is off.
    """
    from hybrid_jax.parity_report import TOKENS, TOLERANCE, verify, write_parity

    parity, tolerance = verify(args.source, args.tokens or TOKENS), args.tolerance or TOLERANCE
    report = write_parity(parity, args.verify, str(args.source), tolerance)
    print(f"parity: {report}")
    if wrong := parity.off(tolerance):
        raise ValueError(f"{args.source} is not read as it is: {'; '.join(wrong)}; see {report}")
    if parity.untested:
        print(f"not tested, because the sample is too short: {'; '.join(parity.untested)}; give more --tokens")
    if parity.layers is None:
        print(f"outputs were not compared with transformers: {parity.why_not}")
    else:
        print(f"largest relative error of a layer {max(parity.layers):.1e}, of the logits {parity.logits:.1e}")
