"""What changes from step to step of a phase, and is saved in its checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Health(NamedTuple):
    """Counters of a phase's steps, scalars on the device: what the step needs to recognize a spike, and the loop to give up.

    Attributes:
      steps: accepted steps.
      mean_loss, mean_norm: running means over accepted steps of the loss and of the gradient's global norm.
      skipped: skipped steps in total.
      in_a_row: skipped steps since the last accepted one.
    """

    steps: jax.Array
    mean_loss: jax.Array
    mean_norm: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array

    @classmethod
    def new(cls) -> Health:
        """Returns the counters before the first step."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, jnp.zeros(()), jnp.zeros(()), zero, zero)


class TrainState(NamedTuple):
    """What a step changes, and takes over (donates) from the step before.

    Attributes:
      trainable: the parameters that train, by the stacked model's names, in float32.
      optimizer: optax's state, sharded as its parameters are.
      health: the phase's counters.
    """

    trainable: dict[str, jax.Array]
    optimizer: Any
    health: Health
