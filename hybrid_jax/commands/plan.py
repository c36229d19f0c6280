"""`plan`: what a job needs on a TPU slice or GPUs, from the real step, compiled here for TPUs."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from hybrid_jax.commands.options import OVERRIDES, directory, integer, number
from hybrid_jax.commands.quiet import native_stderr_hidden

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hybrid_jax.config import ModelConfig
    from hybrid_jax.experiment_config import Experiment
    from hybrid_jax.plan.program import Job


# Options that describe a step, with their defaults; with --config the phase describes it.
STEP = {"pattern": "", "seq_len": 8192, "program": "train", "teacher": None, "rows": 0, "remat": "full", "trainable": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}. {OVERRIDES}"
    parser.add_argument("--source", type=directory, help="a directory with config.json (no weights needed), or a public name")
    parser.add_argument(
        "--config", metavar="FILE", help="in place of --source: an experiment config, of which --phase is planned; it needs no data"
    )
    parser.add_argument("--phase", help="with --config: the phase whose step is planned, as the config has it")
    parser.add_argument(
        "--pattern", default=STEP["pattern"], help="one symbol per layer, or e.g. GKA:0.5; default: the source as it is"
    )
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v5p (the smallest slice that fits), h100:64, …")
    parser.add_argument("--mesh", help="e.g. fsdp=8,seq=8; default: the phase's own, or else chosen")
    parser.add_argument(
        "--seq-len", type=integer(minimum=1), default=STEP["seq_len"], help="tokens per row; when decoding, tokens of context"
    )
    parser.add_argument("--program", default=STEP["program"], help="the step to plan: align, train, decode or distill")
    parser.add_argument("--teacher", type=directory, help="of distill: the model that teaches, given as --source is")
    parser.add_argument(
        "--rows", type=integer(minimum=0), default=STEP["rows"], help="rows per step; default: one per part of the batch"
    )
    parser.add_argument("--remat", default=STEP["remat"], help="none, attention or full: what layers keep for their gradient")
    parser.add_argument("--trainable", nargs="+", default=STEP["trainable"], help="patterns of the parameters that train")
    parser.add_argument("--tokens", type=number(above=0), default=1e9, help="tokens to train on, for the time estimate")
    parser.add_argument(
        "--efficiency",
        type=number(above=0, maximum=1),
        default=1.0,
        help="fraction of the bound's speed that is reached, for the time estimate; default: 1, so that it is a least time",
    )
    parser.add_argument("--json", help="write the plan here too")


def _config_of(where: str, source: str) -> ModelConfig:
    """Returns the config of a directory or of a public name; an `-Instruct` model has the shapes of the one it was made from.

    Raises:
      ValueError: it is neither.
    """
    from hybrid_jax.convert.load import read_model_config
    from hybrid_jax.families import config_from_hf
    from hybrid_jax.families.public import PUBLIC

    for name in (source, source.removesuffix("-Instruct")):
        if name in PUBLIC:
            return config_from_hf(PUBLIC[name])
    if pathlib.Path(source).is_dir():
        return read_model_config(source)
    raise ValueError(f"{where} {source!r} is no directory and no name known here: {', '.join(PUBLIC)}")


def _job(args: argparse.Namespace) -> Job:
    """Returns the job that the options describe.

    Raises:
      ValueError: they contradict each other.
    """
    from hybrid_jax.checks import check_choice
    from hybrid_jax.model import REMAT
    from hybrid_jax.plan.planner import spread_pattern
    from hybrid_jax.plan.program import Job

    if args.phase or args.overrides:
        raise ValueError(f"{'--phase' if args.phase else args.overrides[0]} needs --config")
    check_choice("--remat", args.remat, REMAT)
    config = _config_of("--source", args.source)
    teacher = _config_of("--teacher", args.teacher) if args.teacher else None
    hybrid = config.with_pattern(spread_pattern(args.pattern, config)) if args.pattern else config
    return Job(hybrid.unfused(), args.program, args.seq_len, args.rows, tuple(args.trainable), args.remat, config, teacher)


def _stored_dtype(source: str) -> str:
    """Returns the dtype that the config.json of a directory says its weights have; where nothing says it, that of most sources."""
    from hybrid_jax.files import read_json

    path = pathlib.Path(source) / "config.json"
    values = read_json(path) if path.is_file() else {}
    return str(values.get("dtype") or values.get("torch_dtype") or "bfloat16")


def _rounded_before(experiment: Experiment, name: str, models: Mapping[str, ModelConfig]) -> frozenset[str]:
    """Returns the names of the parameters that are not the source's when a phase begins, because phases before kept them frozen in
    a smaller dtype than this one has.

    Args:
      name: the phase's.
      models: see `Experiment.models`.
    """
    from hybrid_jax.parameters import abstract_marks, abstract_parameters
    from hybrid_jax.train.phase_layout import trained_names

    exact = {dict(experiment.phases)[name].frozen_dtype, _stored_dtype(experiment.source), "", "float32"}
    found, before = set(), None
    for earlier, phase in experiment.phases:
        model = models[earlier]
        if phase.pattern or before is None or not before.is_fused:  # what the teacher alone reads is the source's again
            found &= abstract_parameters(model.unfused()).keys()
        if earlier == name:
            break
        if phase.frozen_dtype not in exact:
            frozen = {n for n, mark in abstract_marks(model).items() if mark.frozen}
            found |= frozen - trained_names(model, phase.trainable)
        before = model
    return frozenset(found)


def _job_of_phase(args: argparse.Namespace) -> tuple[Job, dict[str, int]]:
    """Returns the step of a phase of an experiment, and the mesh that the config has for it, empty if it has none.

    Raises:
      ValueError: there is no such phase, or an option says what the phase says.
    """
    from hybrid_jax.experiment_config import Experiment
    from hybrid_jax.fields import load_experiment_config
    from hybrid_jax.plan.program import Job
    from hybrid_jax.train.objectives import OBJECTIVES

    if given := [name for name, default in STEP.items() if getattr(args, name) != default]:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} cannot stand beside --config, whose phase says it; override the config's field instead")
    config = load_experiment_config([f"--config={args.config}", *args.overrides])
    experiment = Experiment.from_config(config, with_data=False)
    phases = dict(experiment.phases)
    if args.phase not in phases:
        raise ValueError(f"--phase {args.phase!r}: the config's schedule has {', '.join(phases) or 'no phase'}")
    if not experiment.source:
        raise ValueError("the config makes a new model; plan conversions by --config, other models by --source")
    if experiment.select is not None:
        raise ValueError("the config selects its pattern by the weights, which a plan does not have; give --config.pattern=...")
    phase, source = phases[args.phase], experiment.with_mixer_options(_config_of("config.source", experiment.source))
    in_step = phase.teacher and OBJECTIVES[phase.objective].two_streams
    teacher = _config_of(f"config.phases.{args.phase}.teacher", phase.teacher) if in_step else None
    models = experiment.models(source)
    changed = experiment.trained_before(args.phase, models) | _rounded_before(experiment, args.phase, models)
    return Job.of_phase(models[args.phase], phase, source, teacher, changed), dict(phase.mesh or experiment.mesh)


def run(args: argparse.Namespace) -> None:
    import contextlib
    import json
    import os

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # read when JAX is imported: there is no TPU to ask for its metadata
    import jax
    from rich.console import Console

    jax.config.update("jax_platforms", "cpu")  # the devices planned for are not there

    from hybrid_jax.files import check_new_file, write_text
    from hybrid_jax.hardware import TPUS
    from hybrid_jax.parallel.mesh import parse_mesh
    from hybrid_jax.plan.plan_report import cache_table, plan_json, plan_table
    from hybrid_jax.plan.planner import make_plan
    from hybrid_jax.plan.program import topology_devices

    if args.json:
        check_new_file(args.json)
    mesh = parse_mesh(args.mesh) if args.mesh else None
    if bool(args.source) == bool(args.config):
        raise ValueError("give either --source, a model, or --config and --phase, a phase of an experiment")
    if args.config:
        job, own = _job_of_phase(args)
        mesh = mesh or own or None
    else:
        job = _job(args)
    if args.topology.partition(":")[0] in TPUS:
        with native_stderr_hidden(), contextlib.suppress(FileNotFoundError):
            topology_devices("v5e", "2x2")  # loads libtpu, which says at length that this machine has no TPU
    console = Console(width=None if Console().is_terminal else 140)
    plan = make_plan(job, args.topology, mesh, log=console.print)
    console.print(plan_table(plan, args.tokens, args.efficiency))
    if job.program == "decode":
        console.print(cache_table(plan))
    if args.json:
        write_text(args.json, json.dumps(plan_json(plan, args.tokens, args.efficiency), indent=2) + "\n")
