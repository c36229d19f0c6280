"""A run's working directory: it belongs to one config.

It holds

    config.json       what is being run; another config in the same directory is refused, except for more steps (see `lengthen`)
    stages/NN_NAME/   a Hugging Face directory of each finished stage, 00_initial first
    checkpoints/NAME/ of the phase under way; of a finished one, if it has keep_every or keep_best
    metrics.jsonl, tensorboard/, run.png
    model/            the outcome
    before_lengthening/  outcomes of phases that were given more steps when they had ended
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from hybrid_jax.config_file import flat
from hybrid_jax.experiment_config import with_absolute_paths
from hybrid_jax.files import check_new_directory, check_writable, new_directory, write_text
from hybrid_jax.lengthen import lengthen_phases
from hybrid_jax.parallel.distributed import say

DIFFERENCES = 5  # of two configs, that a message names


def stage_path(workdir: pathlib.Path, number: int, name: str) -> pathlib.Path:
    """Returns the directory of a stage's outcome; stage 0 is `initial`, stage n the n-th phase."""
    return workdir / "stages" / f"{number:02d}_{name}"


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Makes the working directory this config's, or checks that it is already; meshes may change, and phases get more steps.

    A run that ended before it made anything, e.g. because its text could not be read, leaves the directory to the next config.

    Args:
      config: the record of an experiment, in JSON's types; see `Experiment`.

    Raises:
      ValueError: it belongs to another config. PermissionError: it cannot be written any more.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    record = workdir / "config.json"
    stages = {name: stage_path(workdir, number, name) for number, name in enumerate(config["schedule"], start=1)}
    lengthen_phases(record, dict(config), stages, lambda old, new: not _differences(old, new))
    if record.exists():
        differences = _differences(json.loads(record.read_text()), config)
        if differences and [p.name for p in workdir.iterdir()] == [record.name]:
            say(f"{workdir} has nothing of a run but its config (it ended before its first stage): the new config takes its place")
            write_text(record, text + "\n")
        elif differences:
            more = f" and {len(differences) - DIFFERENCES} more" if len(differences) > DIFFERENCES else ""
            raise ValueError(
                f"{workdir} holds a run of another config: {'; '.join(differences[:DIFFERENCES])}{more} (compare {record}); "
                "choose another --workdir, or remove this one"
            )
        for place in (workdir, workdir / "stages", *(workdir / "checkpoints").glob("*")):
            if place.is_dir():
                check_writable(place)
        return
    check_new_directory(workdir)
    with new_directory(workdir) as directory:
        (directory / "config.json").write_text(text + "\n")


def _without_meshes(config: Mapping[str, Any]) -> dict[str, Any]:
    phases = {name: {k: v for k, v in phase.items() if k != "mesh"} for name, phase in config["phases"].items()}
    return {k: v for k, v in config.items() if k != "mesh"} | {"phases": phases}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the fields in which two configs differ, a sentence for each, except meshes and ways to write the same path."""
    old, new = (flat(_without_meshes(with_absolute_paths(c))) for c in (old, new))
    differ = [name for name in sorted({*old, *new}) if (name in old) != (name in new) or old[name] != new[name]]
    was, now = ({name: repr(c[name]) if name in c else "absent" for name in differ} for c in (old, new))
    return [f"config.{name} is {now[name]} now and was {was[name]}" for name in differ]
