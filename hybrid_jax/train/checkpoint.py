"""Checkpoints of a phase, by orbax: of a step the state, and beside it the data iterator's and the logging interval's."""

from __future__ import annotations

import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policy

from hybrid_jax.files import unused
from hybrid_jax.parallel.distributed import barrier, is_first, of_every_process, say
from hybrid_jax.train.state import Health, TrainState

READ_ERRORS = (ValueError, OSError, KeyError, TypeError)  # that orbax raises when it restores
WAITS = (1.0, 5.0, 25.0)  # seconds before each further attempt
_STATUS = re.compile(r"[A-Z_]{5,}(?=: )")  # of TensorStore, at the beginning of a ValueError's message
_DECODED_WRONG = ("DATA_LOSS", "OUT_OF_RANGE")  # a checksum or a header is wrong, a file is too short
_UNDECODABLE = re.compile(r"Error decoding|corrupt|decompress")  # what was read is not what a writer writes


def _status(error: Exception) -> str:
    found = _STATUS.match(str(error))
    return found.group() if found else ""


def _is_missing(error: Exception) -> bool:
    absent = isinstance(error, KeyError) and "was not found in the checkpoint" in str(error)
    return absent or isinstance(error, FileNotFoundError) or _status(error) == "NOT_FOUND"


def is_damage(error: Exception) -> bool:
    """Whether an error of reading proves that the files are not those that were saved: missing, too short, or undecodable."""
    broken = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) or _status(error) in _DECODED_WRONG
    undecodable = isinstance(error, ValueError) and not _status(error) and bool(_UNDECODABLE.search(str(error)))
    return broken or undecodable or _is_missing(error)


def may_pass(error: Exception) -> bool:
    """Whether reading again may succeed: input and output, a network, a file that another host does not show yet."""
    status = _status(error)
    return isinstance(error, OSError) or _is_missing(error) or bool(status and status not in _DECODED_WRONG)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split(" [tensorstore_spec")[0].split())[:600]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {**state._asdict(), "health": state.health._asdict()}


class _KeepBest:
    """Orbax's preservation policy for `Checkpoints.best`."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        return [c.step == self.checkpoints.best for c in checkpoints]


class Checkpoints:
    """Saves asynchronously and atomically (orbax writes beside, then renames).

    Args:
      keep, keep_every: the newest that stay; and the steps, in multiples, whose checkpoints stay; 0: none.

    Attributes:
      best: the step whose checkpoint stays too, whatever comes after it; 0: none.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2, keep_every: int = 0):
        self.best = 0
        policies = [policy.LatestN(keep), *([policy.EveryNSteps(keep_every)] if keep_every else []), _KeepBest(self)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(policies), create=True, enable_async_checkpointing=True
        )
        self.directory = directory.absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, beside: dict) -> None:
        """Starts saving the state, and as JSON what is `beside` it; an error of the save before this one is raised here.

        Raises:
          OSError: the last save failed (disk full, directory gone).
        """
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(beside)),
            force=True,
        )

    def restore_latest(self, like: TrainState) -> tuple[int, TrainState, dict] | None:
        """(step, state, what was saved beside it) of the newest checkpoint that no process finds damaged; None if there never was
        one.

        The state comes in the shapes and shardings of `like`, whatever mesh, devices and processes saved it. Damaged ones (see
        `is_damage`) are passed over with a warning; when an older one has been read they are renamed to `damaged-STEP`, so that
        their steps can be saved again. Nothing is ever deleted.

        Raises:
          ValueError: there are checkpoints and all are damaged, or one holds other parameters than `like`.
          OSError: one could not be read, now, for a reason other than damage; it is left as it is. Or only some processes see
            any checkpoint.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        every = sorted(self.manager.all_steps(), reverse=True)
        step, got = every[0] if every else 0, None
        while (agreed := min(all_of := of_every_process(step))) != max(all_of) or (agreed and got is None):
            if not agreed:
                raise OSError(
                    f"only some processes of the job see checkpoints in {self.directory}; every one must see the same directory"
                )
            step, got = self._newest_readable([s for s in every if s <= agreed], target)
        if not agreed:
            return None
        self._set_aside([s for s in every if s > step])
        assert got is not None  # the loop above ends with a checkpoint, or without any step
        state = {**got["state"], "health": Health(**got["state"]["health"])}
        return step, TrainState(**state), got["data"]

    def _newest_readable(self, steps: Sequence[int], target: Any) -> tuple[int, Any]:
        """(step, what it holds) of the first of these checkpoints that is not damaged, for this process; of several each reads
        its own part of the files, so that what one finds another may not.

        Raises:
          ValueError, OSError: as `restore_latest`.
        """
        for step in steps:
            try:
                return step, self._read(step, target)
            except READ_ERRORS as e:
                if not is_damage(e):
                    kind = OSError if may_pass(e) else ValueError
                    raise kind(
                        f"the checkpoint of step {step} in {self.directory} could not be read: {_reason(e)}; nothing was changed. "
                        "If the cause has passed, the same command resumes; to go on from the one before, move this one away"
                    ) from e
                say(
                    f"the checkpoint of step {step} in {self.directory} is damaged and cannot be read, trying the one before: "
                    f"{_reason(e)}"
                )
        raise ValueError(
            f"none of the checkpoints in {self.directory} (steps {', '.join(map(str, steps))}) can be read; repair or remove "
            "the directory to begin the phase again"
        )

    def _read(self, step: int, target):
        """What a checkpoint holds; tries again after an error that may pass."""
        for wait in (*WAITS, None):
            try:
                return self.manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
                )
            except READ_ERRORS as e:
                if wait is None or not may_pass(e):
                    raise
                print(f"reading the checkpoint of step {step} failed, again in {wait:.0f} s: {_reason(e)}", flush=True)
                time.sleep(wait)

    def _set_aside(self, steps: Sequence[int]):
        if is_first():
            for step in steps:
                new = unused(self.directory / f"damaged-{step}")
                (self.directory / str(step)).rename(new)
                print(f"the damaged checkpoint of step {step} is now {new}", flush=True)
        barrier("set damaged checkpoints aside")
        if steps:
            self.manager.reload()

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          OSError: it failed.
        """
        self.manager.wait_until_finished()
        self.manager.close()


def restore_trainable(
    directory: pathlib.Path, like: dict[str, jax.ShapeDtypeStruct], step: int | None = None
) -> dict[str, jax.Array]:
    """The parameters of a checkpoint (the newest if no step is given) without the optimizer's state.

    Args:
      like: shapes, dtypes and shardings of those that train, by their stacked names.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of that step; says which there are.
      ValueError: it cannot be read, or holds other parameters.
    """
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    if not steps or step not in (None, *steps):
        there = f"steps {', '.join(map(str, sorted(steps)))}" if steps else "none"
        raise FileNotFoundError(f"no checkpoint{f' of step {step}' if step else ''} in {directory}; there: {there}")
    step = max(steps) if step is None else step
    wanted = ocp.args.PyTreeRestore(
        {"trainable": like}, ocp.checkpoint_utils.construct_restore_args({"trainable": like}), partial_restore=True
    )
    try:
        with ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
            return manager.restore(step, args=ocp.args.Composite(state=wanted))["state"]["trainable"]
    except (ValueError, OSError, KeyError, TypeError) as e:
        raise ValueError(f"the checkpoint of step {step} in {directory} cannot be read: {_reason(e)}") from e
