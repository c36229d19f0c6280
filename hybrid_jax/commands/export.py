"""`export SRC OUT`."""

from __future__ import annotations

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("source", help="a run's working directory, or a model directory")
    parser.add_argument("out", help="the Hugging Face directory to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: the source's")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="larger models are written in several files")
    parser.add_argument("--keep-teacher", action="store_true", help="keep a fused model fused")


def run(args: argparse.Namespace):
    from hybrid_jax.convert import load_model, save_model
    from hybrid_jax.files import check_new_directory
    from hybrid_jax.priming.fuse import unfuse

    check_new_directory(args.out)
    source = pathlib.Path(args.source)
    if (source / "stages").is_dir():
        source = source / "model"
        if not source.is_dir():
            raise FileNotFoundError(f"{args.source} is a run that has not finished; run its command again to resume it")
    model = load_model(source, dtype=args.dtype)
    if not args.keep_teacher:
        model = unfuse(model)
    save_model(model, args.out, tokenizer_from=source, max_shard_bytes=int(args.max_shard_gb * 1e9))
    print(f"{args.out}: {model.config.family}, {model.config.pattern}")
