"""`plan`: what a job needs on a TPU slice or GPUs, from the real step, compiled here for TPUs."""

from __future__ import annotations

import argparse
import pathlib

from hybrid_jax.commands.options import directory, integer, number
from hybrid_jax.commands.quiet import native_stderr_hidden


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", required=True, type=directory, help="a directory with config.json (no weights needed), or a public name"
    )
    parser.add_argument("--pattern", default="", help="one symbol per layer, or e.g. GKA:0.5; default: the source as it is")
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v5p (the smallest slice that fits), h100:64, …")
    parser.add_argument("--mesh", help="e.g. fsdp=8,seq=8; default: chosen")
    parser.add_argument("--seq-len", type=integer(minimum=1), default=8192, help="tokens per row; when decoding, tokens of context")
    parser.add_argument("--program", default="train", help="the step to plan: align, train, decode or distill")
    parser.add_argument("--teacher", type=directory, help="of distill: the model that teaches, given as --source is")
    parser.add_argument("--rows", type=integer(minimum=0), default=0, help="rows per step; default: one per part of the batch")
    parser.add_argument("--remat", default="full", help="none, attention or full: what layers keep for their gradient")
    parser.add_argument("--trainable", nargs="+", default=(), help="patterns of the parameters that train")
    parser.add_argument("--tokens", type=number(above=0), default=1e9, help="tokens to train on, for the time estimate")
    parser.add_argument(
        "--efficiency",
        type=number(above=0, maximum=1),
        default=1.0,
        help="fraction of the bound's speed that is reached, for the time estimate; default: 1, so that it is a least time",
    )
    parser.add_argument("--json", help="write the plan here too")


def run(args: argparse.Namespace) -> None:
    import contextlib
    import json
    import os

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # read when JAX is imported: there is no TPU to ask for its metadata
    import jax
    from rich.console import Console

    jax.config.update("jax_platforms", "cpu")  # the devices planned for are not there

    from hybrid_jax.checks import check_choice
    from hybrid_jax.config import ModelConfig
    from hybrid_jax.convert.load import read_model_config
    from hybrid_jax.families import config_from_hf
    from hybrid_jax.families.public import PUBLIC
    from hybrid_jax.files import check_new_file, write_text
    from hybrid_jax.hardware import TPUS
    from hybrid_jax.model import REMAT
    from hybrid_jax.parallel.mesh import parse_mesh
    from hybrid_jax.plan.plan_report import cache_table, plan_json, plan_table
    from hybrid_jax.plan.planner import make_plan, spread_pattern
    from hybrid_jax.plan.program import Job, topology_devices

    check_choice("--remat", args.remat, REMAT)
    if args.json:
        check_new_file(args.json)
    mesh = parse_mesh(args.mesh) if args.mesh else None

    def config_of(option: str, name: str) -> ModelConfig:
        if name in PUBLIC:
            return config_from_hf(PUBLIC[name])
        if pathlib.Path(name).is_dir():
            return read_model_config(name)
        raise ValueError(f"{option} {name!r} is no directory and no name known here: {', '.join(PUBLIC)}")

    config = config_of("--source", args.source)
    teacher = config_of("--teacher", args.teacher) if args.teacher else None
    hybrid = config.with_pattern(spread_pattern(args.pattern, config)) if args.pattern else config
    job = Job(hybrid.unfused(), args.program, args.seq_len, args.rows, tuple(args.trainable), args.remat, config, teacher)
    if args.topology.partition(":")[0] in TPUS:
        with native_stderr_hidden(), contextlib.suppress(FileNotFoundError):
            topology_devices("v5e", "2x2")  # loads libtpu, which says at length that this machine has no TPU
    console = Console(width=None if Console().is_terminal else 140)
    plan = make_plan(job, args.topology, mesh, log=console.print)
    console.print(plan_table(plan, args.tokens, args.efficiency))
    if args.program == "decode":
        console.print(cache_table(plan))
    if args.json:
        write_text(args.json, json.dumps(plan_json(plan, args.tokens, args.efficiency), indent=2) + "\n")
