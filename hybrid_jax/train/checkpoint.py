"""Checkpoints of a phase, by orbax: parameters, optimizer state, the run's health and the data iterator's state at a step."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from hybrid_jax.parallel.distributed import say


class Health(NamedTuple):
    """Of a run so far: steps that counted, running means of their losses and gradient norms, steps skipped, those in a row."""

    steps: jax.Array
    mean_loss: jax.Array
    mean_norm: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array

    @classmethod
    def new(cls) -> Health:
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, jnp.zeros(()), jnp.zeros(()), zero, zero)


class TrainState(NamedTuple):
    """What changes from step to step: trainable parameters, the optimizer's state, the run's health."""

    trainable: dict[str, jax.Array]
    optimizer: Any
    health: Health


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {**state._asdict(), "health": state.health._asdict()}


class Checkpoints:
    """Saves asynchronously and atomically (orbax writes beside, then renames).

    Args:
      keep, keep_every: the newest that stay; and the steps, in multiples, whose checkpoints stay; 0: none.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2, keep_every: int = 0):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, create=True, enable_async_checkpointing=True
        )
        self.directory = directory.absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, data_state: dict):
        """Starts saving; an error of the save before this one is raised here.

        Raises:
          OSError: the last save failed (disk full, directory gone).
        """
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(data_state)),
            force=True,
        )

    def restore_latest(self, like: TrainState) -> tuple[int, TrainState, dict] | None:
        """(step, state, the data iterator's state) of the newest checkpoint that can be read; None if there never was one.

        The state comes in the shapes and shardings of `like`, whatever mesh, devices and processes saved it. One that can not be
        read is left out with a warning and removed, so that its step can be saved again.

        Raises:
          ValueError: there are checkpoints and none can be read.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        for step in steps:
            try:
                got = self.manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
                )
            except (ValueError, OSError, KeyError, TypeError) as e:
                reason = " ".join(str(e).split())[:300]
                say(f"the checkpoint of step {step} in {self.directory} cannot be read, trying the one before: {reason}")
                continue
            for bad in (s for s in steps if s > step):
                self.manager.delete(bad)
            state = {**got["state"], "health": Health(**got["state"]["health"])}
            return step, TrainState(**state), got["data"]
        if steps:
            raise ValueError(
                f"none of the checkpoints in {self.directory} (steps {', '.join(map(str, steps))}) can be read; repair or remove "
                "the directory to begin the phase anew"
            )
        return None

    def close(self):
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
      ValueError: it can not be read, or holds other parameters.
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
        raise ValueError(f"the checkpoint of step {step} in {directory} can not be read: {' '.join(str(e).split())[:300]}") from e
