"""`cache-teacher`: keep a teacher's likeliest tokens for the rows of a config's phase, for `distill_cached`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser):
    parser.epilog = "Fields of the config are overridden by --config.a.b=value."
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment config")
    parser.add_argument("--phase", required=True, help="the phase that will distil")
    parser.add_argument("--teacher", help="a model directory with the source's tokenizer; default: the source itself")
    parser.add_argument("--k", type=int, default=64, help="tokens kept of every distribution")


def run(args: argparse.Namespace):
    import pathlib

    import jax.numpy as jnp

    from hybrid_jax.commands.experiments import load_config
    from hybrid_jax.convert import check_model_directory, load_model
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer, read_corpus
    from hybrid_jax.experiment import mesh_of, mix_of, phases_of_config
    from hybrid_jax.train.cache import cache_teacher

    config = load_config([f"--config={args.config}", *args.overrides])
    phases = phases_of_config(config)
    number = next((n for n, (name, _) in enumerate(phases, start=1) if name == args.phase), None)
    if number is None:
        raise ValueError(f"--phase {args.phase!r}: the config's schedule has {', '.join(name for name, _ in phases)}")
    phase = phases[number - 1][1]
    if not phase.teacher_cache:
        raise ValueError(f"phase {args.phase!r} has no teacher_cache, the directory to write and to distil from")
    tokenizer = load_tokenizer(config.source)
    for directory in dict.fromkeys((config.source, args.teacher or config.source)):
        check_tokenizer_fits(tokenizer, check_model_directory(directory).vocab_size, config.source)
    mesh = mesh_of(config, phase)
    teacher = load_model(args.teacher or config.source, dtype=jnp.float32, mesh=mesh)
    corpus = read_corpus(config.data.to_dict(), config.source, teacher.config.extra.get("eos_token_id"))
    mix, seed = mix_of(config, phase), config.seed + number
    phase = phase.in_steps(corpus, mix, seed)
    cache_teacher(teacher, phase, corpus, mix, seed=seed, out=pathlib.Path(phase.teacher_cache), k=args.k, mesh=mesh)
    print(f"{phase.teacher_cache}: {phase.steps:,} steps of {phase.batch_size} rows, the {args.k} likeliest tokens each")
