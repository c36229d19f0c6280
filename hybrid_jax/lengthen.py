"""Lengthening phases of a run: more steps in the same working directory, on from the newest checkpoint."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hybrid_jax.files import unused, write_text
from hybrid_jax.parallel.distributed import say
from hybrid_jax.train.optimizer import learning_rate_schedule
from hybrid_jax.train.phase import Phase

COUNTS = ("steps", "tokens")  # what may change; of epochs the steps are not known before the text is read
ASIDE = "before_lengthening"


def lengthen_phases(
    record: pathlib.Path, new: dict, stages: Mapping[str, pathlib.Path], same: Callable[[dict, dict], bool]
) -> None:
    """Gives phases of a run more steps, if that is all that `new` changes; else does nothing.

    An unfinished phase goes on from its newest checkpoint. A finished one does so too, if its last checkpoint is still there
    (`keep_every`) and no later phase has begun; its result, and the run's, are moved to `before_lengthening/`. The schedule
    becomes that of the larger number of steps; whether that changes the learning rates of steps already done is said.

    Args:
      record: the run's config.json, which becomes that of the longer run.
      new: the config now asked for.
      stages: name of each phase, in order -> the directory of its result.
      same: whether two configs are of the same run.

    Raises:
      ValueError: a finished phase cannot be lengthened any more; says why and what to do.
    """
    if not record.exists():
        return
    old = json.loads(record.read_text())
    changed = [n for n in stages if n in old.get("phases", {}) and _counts(old["phases"][n]) != _counts(new["phases"][n])]
    adopted = {**old, "phases": {**old["phases"], **{n: _with_counts(old["phases"][n], new["phases"][n]) for n in changed}}}
    if not changed or not same(adopted, new):
        return
    before, after = ({n: Phase.from_config(n, c["phases"][n]) for n in changed} for c in (old, adopted))
    if any(after[n].steps < before[n].steps for n in changed):
        return
    checkpoints = record.parent / "checkpoints"
    done = {n: _newest(checkpoints / n) for n in changed}
    for n in changed:
        _check_can_go_on(n, before[n], checkpoints, stages)
    for n in changed:
        if stages[n].exists():
            aside = unused(record.parent / ASIDE / f"{n}_{before[n].steps}_steps")
            aside.mkdir(parents=True)
            for result in (record.parent / "model", stages[n]):
                if result.exists():
                    result.rename(aside / result.name)
            say(f"{n}: the result of {before[n].steps:,} steps is now in {aside}")
    write_text(record, json.dumps(adopted, indent=2, sort_keys=True) + "\n")
    for n in changed:
        say(_said(n, before[n], after[n], done[n]))


def _counts(phase: Mapping) -> dict:
    return {k: phase[k] for k in COUNTS if phase.get(k)}


def _with_counts(old: Mapping, new: Mapping) -> dict:
    return {k: v for k, v in old.items() if k not in COUNTS} | {k: new[k] for k in COUNTS if k in new}


def _newest(directory: pathlib.Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max(ocp.utils.checkpoint_steps(directory), default=0) if directory.is_dir() else 0


def _check_can_go_on(name: str, phase: Phase, checkpoints: pathlib.Path, stages: Mapping[str, pathlib.Path]):
    if not stages[name].exists():
        return
    advice = f"choose another --workdir, with {stages[name]} as the source to train on from its result"
    names = list(stages)
    later = [n for n in names[names.index(name) + 1 :] if stages[n].exists() or _newest(checkpoints / n)]
    if later:
        raise ValueError(f"phase {name!r} cannot be lengthened: phase {later[0]!r} has been trained from its result; {advice}")
    if _newest(checkpoints / name) < phase.steps:
        raise ValueError(
            f"phase {name!r} cannot be lengthened: it is finished, and its last checkpoint, which held the optimizer's state, was "
            f"removed because phase.keep_every is {phase.keep_every}; {advice}. A phase with keep_every keeps it"
        )


def _said(name: str, old: Phase, new: Phase, done: int) -> str:
    def rates(phase):
        return np.broadcast_to(np.asarray(learning_rate_schedule(phase)(jnp.arange(done + 1))), done + 1)

    was, now = rates(old), rates(new)
    words = "the learning rates of the steps done are those of the longer schedule too"
    if not np.array_equal(was[:done], now[:done]):
        words = (
            f"the {new.schedule} schedule is computed again: the steps done had the learning rates of {old.steps:,} steps, the "
            f"last of them {was[done - 1]:.3g}, and the next one has {now[done]:.3g}, so this is not what {new.steps:,} steps "
            "from the start would give"
        )
    return f"{name}: lengthened from {old.steps:,} to {new.steps:,} steps, on from step {done:,}; {words}"
