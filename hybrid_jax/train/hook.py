"""The contract of a hook: something that the training loop calls every so many steps, and logs what it returns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from hybrid_jax.data import Corpus
from hybrid_jax.model import Decoder

if TYPE_CHECKING:
    from hybrid_jax.train.phase import Phase
    from hybrid_jax.train.phase_layout import PhaseLayout
    from hybrid_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepView:
    """A phase after one of its steps, as a hook sees it. Its arrays are valid during the call only: the next step reuses them.

    Attributes:
      name, phase: the phase's name and settings.
      corpus: the run's data, its held-out part and its tokenizer.
      step: the number of steps done.
      mesh: the mesh whose context the hook runs in; None for one device.
      state, frozen, layout: the parameters as they are trained.
    """

    name: str
    phase: Phase
    corpus: Corpus
    step: int
    mesh: Mesh | None
    state: TrainState
    frozen: dict[str, jax.Array]
    layout: PhaseLayout

    @functools.cached_property
    def model(self) -> Decoder:
        """The model in the phase's form, repeated layers stacked, sharded over the mesh."""
        return self.layout.models(self.state.trainable, self.frozen)[0]


EVALUATION = "evaluation"  # the name of the hook behind `phase.eval_every`
EVAL = "eval"  # the group of its values, and of no other hook's


class Hook:
    """Called after every `every`-th step and after the last one, on every process of a job, in the mesh's context.

    It must not change what it sees. Its time does not count in `tokens_per_second`.

    A config chooses hooks by `phase.hooks`, see `train.hooks`. The constructor of such a hook takes `every` and its options, as
    keyword-only arguments. It checks the options (ValueError), and does nothing that takes time: it is called when the config is
    read and again when the phase begins.

    Args:
      every: steps between two calls, at least 1.
    """

    name = "hook"
    """The key of its state in a checkpoint, different for each hook of a phase; in a config, the hook's name there."""

    def __init__(self, every: int):
        self.every = every

    def __call__(self, view: StepView) -> Mapping[str, float]:
        """Returns what is logged for this step; name values `group/name`, and return the same on every process.

        The group is not `eval`, which is that of the evaluation behind `phase.eval_every`.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON; saved with every checkpoint, after the call of that step."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of a checkpoint."""


def call(hooks: Iterable[Hook], view: StepView) -> dict[str, float]:
    """Calls hooks in their order and returns what all of them log.

    Raises:
      ValueError: two hooks log a value of the same name, or one logs what the evaluation behind `phase.eval_every` does, by which
        the best checkpoint is chosen.
    """
    values: dict[str, float] = {}
    for hook in hooks:
        found = hook(view)
        own = [name for name in found if name.startswith(f"{EVAL}/")] if hook.name != EVALUATION else []
        if taken := [*own, *(name for name in found if name in values)]:
            raise ValueError(
                f"phase.hooks.{hook.name} logs {taken[0]!r}, a name of {'phase.eval_every' if own else 'another hook'}'s; "
                "its values need a group of their own"
            )
        values |= found
    return values
