"""`cache-teacher`: keep a teacher's top-k tokens for the rows of a config's phase, for `distill_cached`."""

from __future__ import annotations

import argparse

from hybrid_jax.commands.options import OVERRIDES, directory, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}. {OVERRIDES}"
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment config")
    parser.add_argument("--phase", required=True, help="the phase that will distil")
    parser.add_argument(
        "--teacher",
        type=directory,
        help="a model directory with the source's tokenizer; default: the phase's teacher, or else the source itself",
    )
    parser.add_argument("--k", type=integer(minimum=1), help="tokens kept of every distribution; default: 64")


def run(args: argparse.Namespace) -> None:
    import pathlib

    import jax.numpy as jnp

    from hybrid_jax.convert import check_model_directory, load_model
    from hybrid_jax.data import check_same_ids, check_tokenizer_fits, load_tokenizer, read_corpus
    from hybrid_jax.data.teacher_cache import DEFAULT_K
    from hybrid_jax.experiment_config import Experiment
    from hybrid_jax.fields import load_experiment_config
    from hybrid_jax.parallel.distributed import say
    from hybrid_jax.train.cache import cache_teacher
    from hybrid_jax.train.teacher import teach_student_ids, with_student_ids

    experiment = Experiment.from_config(load_experiment_config([f"--config={args.config}", *args.overrides]))
    names = [name for name, _ in experiment.phases]
    if args.phase not in names:
        raise ValueError(f"--phase {args.phase!r}: the config's schedule has {', '.join(names)}")
    number = 1 + names.index(args.phase)
    phase = experiment.phases[number - 1][1]
    if not phase.teacher_cache:
        raise ValueError(f"phase {args.phase!r} has no teacher_cache, the directory to write and to distil from")
    if args.teacher and phase.teacher:
        raise ValueError(f"phase {args.phase!r} has the teacher {phase.teacher} in its config; leave --teacher out")
    source = pathlib.Path(experiment.source)
    student, given = check_model_directory(source), args.teacher or phase.teacher
    check_tokenizer_fits(load_tokenizer(source), student.vocab_size, source)
    if phase.teacher:
        experiment.check_teacher(args.phase, phase, student)
    elif args.teacher:
        with_student_ids(check_model_directory(args.teacher), student)
        if (pathlib.Path(args.teacher) / "tokenizer.json").exists():
            check_same_ids(args.teacher, source)
    mesh = experiment.mesh_of(phase)
    teacher = load_model(given or source, dtype=jnp.float32, mesh=mesh)
    teacher = teach_student_ids(teacher, student) if given else teacher
    corpus = read_corpus(experiment.data, source, student.extra.get("eos_token_id"))
    mix, seed, k = experiment.mix_of(phase), experiment.seed + number, args.k or DEFAULT_K
    phase = phase.in_steps(corpus, mix, seed)
    cache_teacher(teacher, phase, corpus, mix, seed=seed, out=pathlib.Path(phase.teacher_cache), k=k, mesh=mesh)
    say(f"{phase.teacher_cache}: {phase.steps:,} steps of {phase.batch_size} rows, the {k} top-k tokens each")
