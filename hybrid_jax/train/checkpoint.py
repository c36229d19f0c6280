"""Checkpoints of a phase, by orbax: parameters, optimizer state and the data iterator's state at a step."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp


class TrainState(NamedTuple):
    """What changes from step to step: trainable parameters and the optimizer's state."""

    trainable: dict[str, jax.Array]
    optimizer: Any


class Checkpoints:
    """Saves asynchronously and atomically (orbax writes beside, then renames); keeps the newest two."""

    def __init__(self, directory: pathlib.Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: TrainState, data_state: dict):
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data_state)),
        )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """The state saved at `step`, in the shapes and shardings of `like`, and the data iterator's."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        got = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        )
        return TrainState(**got["state"]), got["data"]

    def close(self):
        self.manager.wait_until_finished()
        self.manager.close()
