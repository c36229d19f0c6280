"""The model of a run at any point of it: its outcome, the end of a phase, or a checkpoint within one."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybrid_jax.claim import stage_path
from hybrid_jax.convert import load_model
from hybrid_jax.experiment import begin_phase
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.files import read_json
from hybrid_jax.model import Decoder
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.stacking import stack, unstack
from hybrid_jax.train import Phase
from hybrid_jax.train.checkpoint import restore_trainable
from hybrid_jax.train.loop import apply_phase_settings
from hybrid_jax.train.phase_layout import PhaseLayout, parameter_shardings


def is_run(directory: str | pathlib.Path) -> bool:
    """Whether it is a run's working directory; one that has just begun has a config.json with a schedule, and no stages."""
    directory = pathlib.Path(directory)
    record = directory / "config.json"
    return (directory / "stages").is_dir() or record.is_file() and "schedule" in read_json(record)


def tokenizer_of(workdir: str | pathlib.Path) -> pathlib.Path:
    """A directory that has the run's tokenizer."""
    return stage_path(pathlib.Path(workdir), 0, "initial")


def load_run(
    workdir: str | pathlib.Path, phase: str = "", step: int | None = None, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Decoder:
    """What a run had.

    Of a checkpoint only the parameters are read, not the optimizer's state; what the phase does not train comes from the stage
    before it. The model has the phase's pattern and form; `priming.fuse.unfuse` makes a fused one the hybrid.

    Args:
      workdir: the run's; it may be under way.
      phase: default: the run's outcome.
      step: a checkpoint's; default: the phase's end, or its newest checkpoint while it has none.
      dtype: of the parameters; None: the files'. Of a checkpoint in a phase that changes the pattern these count as float32.

    Raises:
      FileNotFoundError: no run, or it has not come so far; says what there is.
      ValueError: an unknown phase, or a checkpoint that cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not is_run(workdir):
        raise FileNotFoundError(f"{workdir} is no run's working directory")
    config = json.loads((workdir / "config.json").read_text())
    if not phase:
        if not (workdir / "model").is_dir():
            raise FileNotFoundError(
                f"{workdir} has not finished; run its command again to resume it, or name a phase: {', '.join(config['schedule'])}"
            )
        return load_model(workdir / "model", dtype=dtype, mesh=mesh)
    if phase not in config["schedule"]:
        raise ValueError(f"{workdir} has no phase {phase!r}; it has {', '.join(config['schedule']) or 'none'}")
    number = 1 + list(config["schedule"]).index(phase)
    stage = stage_path(workdir, number, phase)
    if step is None and stage.is_dir():
        return load_model(stage, dtype=dtype, mesh=mesh)
    before = stage_path(workdir, number - 1, (["initial", *config["schedule"]])[number - 1])
    if not before.is_dir():
        raise FileNotFoundError(f"{workdir} has not come to phase {phase!r}: {before} is not there yet")
    source = pathlib.Path(config.get("source") or stage_path(workdir, 0, "initial"))
    # without its hooks: they only log, and their package may be missing here
    of_phase = Phase.from_config(phase, {k: v for k, v in config["phases"][phase].items() if k != "hooks"})
    drawn = jnp.float32 if of_phase.pattern else dtype  # new mixers begin as in the run, which draws them in float32
    model = load_model(before, dtype=drawn, mesh=mesh)
    model = begin_phase(model, Experiment.of_conversions(config), number, of_phase, source, mesh)
    model = _with_checkpoint(apply_phase_settings(model, of_phase), of_phase, workdir / "checkpoints" / phase, step, mesh)
    if dtype is None or drawn is dtype:
        return model
    structure, parameters = split_model(model)
    return join_model(structure, {name: x.astype(dtype) for name, x in parameters.items()})


def _with_checkpoint(model: Decoder, phase: Phase, directory: pathlib.Path, step: int | None, mesh: Mesh | None) -> Decoder:
    """The model with a checkpoint's parameters in place of its own; those that do not train are as the phase has them."""
    layout, (structure, parameters) = PhaseLayout(model, phase), split_model(model)
    trainable, frozen = layout.split(parameters)
    wanted = jax.eval_shape(lambda p: stack(p, layout.names), trainable)
    if mesh is not None:
        where = parameter_shardings(mesh, wanted, layout.axes)
        wanted = {name: x.update(sharding=where[name]) for name, x in wanted.items()}
    trained = unstack(restore_trainable(directory, wanted, step), layout.names)
    rounded = {n: x.astype(frozen[n].dtype) for n, x in layout.rounded(frozen).items()}
    return join_model(structure, {**rounded, **trained})
