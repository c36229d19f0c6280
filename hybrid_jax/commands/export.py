"""`export SRC OUT`."""

from __future__ import annotations

import argparse
from typing import Any

from hybrid_jax.commands.options import directory, integer, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=directory, help="a run's working directory, or a model directory")
    parser.add_argument("out", help="the Hugging Face directory to make")
    parser.add_argument("--phase", default="", help="of a run: this phase's end, or its newest checkpoint; default: the outcome")
    parser.add_argument("--step", type=integer(minimum=0), help="with --phase: this checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: the source's")
    parser.add_argument("--max-shard-gb", type=number(above=0), default=5.0, help="larger models are written in several files")
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="store linear maps and embeddings as integers in groups, in MLX's layout; size and error are printed",
    )
    parser.add_argument("--group-size", type=integer(minimum=8), help="with --quantize: values that share a scale (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory OUT, when the new one is complete")
    parser.add_argument("--keep-teacher", action="store_true", help="keep a fused model fused")


def run(args: argparse.Namespace) -> None:
    from hybrid_jax.config import ModelConfig
    from hybrid_jax.convert import Groups, convert_directory, save_model
    from hybrid_jax.families import plugin_notes
    from hybrid_jax.files import check_new_directory
    from hybrid_jax.priming.fuse import unfuse
    from hybrid_jax.workdir import is_run, load_run, tokenizer_of

    check_new_directory(args.out, args.overwrite, args.source)
    if args.step is not None and not args.phase:
        raise ValueError("--step needs the --phase whose checkpoint it is")
    if args.group_size is not None and args.quantize is None:
        raise ValueError("--group-size is that of --quantize; give both")
    quantization = Groups(int(args.quantize[3:]), args.group_size or 64) if args.quantize else None
    shard = int(args.max_shard_gb * 1e9)
    options: dict[str, Any] = dict(max_shard_bytes=shard, overwrite=args.overwrite, quantization=quantization)
    if is_run(args.source):
        model = load_run(args.source, args.phase, args.step, dtype=args.dtype)
        model = model if args.keep_teacher else unfuse(model)
        config = model.config
        save_model(model, args.out, tokenizer_from=tokenizer_of(args.source), **options)
    elif args.phase:
        raise ValueError(f"--phase {args.phase}: {args.source} is no run's working directory")
    else:
        form = (lambda config: config) if args.keep_teacher else ModelConfig.unfused
        config = convert_directory(args.source, args.out, form, dtype=args.dtype, **options)
    print(f"{args.out}: {config.family}, {config.pattern}")
    for note in plugin_notes(config):
        print(note)
