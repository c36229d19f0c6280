"""The jitted training step: gradients accumulated over microbatches, the update, and which updates are rejected.

A step whose loss or gradient norm is not finite, or is a spike, changes nothing but `Health`. The learning rate follows the
steps of the phase, skipped ones too; the optimizer's moments and their bias corrections follow the accepted steps only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax.data.layout import SOURCE
from hybrid_jax.parallel.mesh import BATCH_AXES
from hybrid_jax.parallel.sharding import TOKENS, axis_size, constrain
from hybrid_jax.train.metrics import gradient_norms
from hybrid_jax.train.objective import Batch, Mean, TokenLosses
from hybrid_jax.train.objectives import make_objective
from hybrid_jax.train.optimizer import learning_rate_schedule
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.state import Health, TrainState

LOSS = "loss"  # of the metrics: the objective's loss, a `Mean`; LOSS/SOURCE is that of one data source's tokens
STOP = "stop_asked"  # of a batch: whether a process was asked to stop; the metric of that name tells all of them

# Spikes are judged against means with a memory of 1 / (1 - DECAY) = 50 steps. During the first TRUSTED accepted steps, where
# losses fall fast, nothing is a spike. Both numbers are a choice; nobody has tuned them.
DECAY, TRUSTED = 0.98, 20

Metrics = dict[str, Any]
"""name -> `Mean`, or a scalar that is a property of the step (a norm, a rate, a count)."""

StepFunction = Callable[[TrainState, Mapping[str, jax.Array], Batch], tuple[TrainState, Metrics]]


def make_step(layout: PhaseLayout, phase: Phase, shardings: TrainState | None = None, sources: Sequence[str] = ()) -> StepFunction:
    """Makes (state, frozen, batch) -> (the next state, metrics), jitted; the state is donated.

    Frozen parameters have neither gradients nor optimizer state. The metrics are the objective's, `LOSS` among them, as means
    that carry their weights, and scalars: gradient norms, `learning_rate` (the one the step was taken with), and the counts
    `skipped` and `skipped_in_a_row`.

    Args:
      shardings: of the state, which the next one keeps.
      sources: names of the data sources of the batch's rows, by number (see `data.layout.SOURCE`); the metrics then have
        `loss/NAME` for each.
    """
    objective, schedule = make_objective(phase.objective, phase.options), learning_rate_schedule(phase)

    def loss_of(trainable, frozen, batch):
        model, teacher = layout.models(trainable, frozen)
        loss, metrics, tokens = objective(model, batch, teacher)
        if sources and tokens is not None:
            metrics = {**metrics, **_losses_by_source(tokens, batch[SOURCE], sources)}
        return loss, metrics

    def step(state: TrainState, frozen, batch):
        batch = dict(batch)
        asked = {STOP: jnp.max(batch.pop(STOP))} if STOP in batch else {}
        grads, metrics = gradients_of(loss_of, state.trainable, frozen, batch, phase.accumulate)
        norms = gradient_norms(grads)
        health, good = _judge(state.health, metrics[LOSS].value, norms["grad_norm"], phase.spike)
        directions, optimizer = layout.optimizer.update(grads, state.optimizer, state.trainable)
        rate = jnp.float32(schedule(state.health.steps + state.health.skipped))
        updates = jax.tree.map(lambda x: -rate * x, directions)
        new = TrainState._make([optax.apply_updates(state.trainable, updates), optimizer, health])
        kept = jax.tree.map(lambda old, new: jnp.where(good, new, old), state[:2], new[:2])
        metrics |= {**norms, **asked, "learning_rate": rate, "skipped": health.skipped, "skipped_in_a_row": health.in_a_row}
        return TrainState._make([*kept, health]), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _judge(health: Health, loss: jax.Array, norm: jax.Array, spike: float) -> tuple[Health, jax.Array]:
    """Returns the counters after this step, and whether the step is accepted."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if spike:
        good &= (health.steps < TRUSTED) | (norm < spike * health.mean_norm) & (loss < spike * health.mean_loss)
    weight = jnp.where(health.steps == 0, 1.0, 1 - DECAY)
    bad = 1 - good.astype(jnp.int32)

    def mean(old, new):
        return jnp.where(good, old + weight * (new - old), old)

    return Health(
        steps=health.steps + 1 - bad,
        mean_loss=mean(health.mean_loss, loss),
        mean_norm=mean(health.mean_norm, norm),
        skipped=health.skipped + bad,
        in_a_row=(health.in_a_row + 1) * bad,
    ), good


def _losses_by_source(tokens: TokenLosses, source: jax.Array, names: Sequence[str]) -> dict[str, Mean]:
    """Returns the loss of each source's own tokens; `source` [B, T] has the number of each token's source."""
    losses, weights = tokens
    own = source[None] == jnp.arange(len(names))[:, None, None]
    totals, counts = (jnp.sum(jnp.where(own, x, 0), axis=(1, 2)) for x in (losses * weights, weights))
    return {f"{LOSS}/{name}": Mean(totals[n], counts[n]) for n, name in enumerate(names)}


def gradients_of(
    loss_of: Callable[[Any, Any, Batch], tuple[Mean, Mapping[str, Mean]]],
    trainable: Any,
    frozen: Any,
    batch: Batch,
    parts: int,
) -> tuple[Any, Metrics]:
    """Returns the gradient of the batch's loss and its metrics, accumulated over `parts` microbatches.

    The loss is a mean, so the gradient of the batch is the mean of the microbatches' gradients by the weights of their losses.
    A metric is the sum of its totals over the sum of its own weights.

    Args:
      loss_of: (trainable, frozen, batch) -> (loss, metrics).
      batch: [B, T, ...] arrays; B is a multiple of `parts` times the devices over which rows are sharded.
    """

    def value_of(trainable, frozen, batch):
        loss, metrics = loss_of(trainable, frozen, batch)
        return loss.value, {**metrics, LOSS: loss}

    both = jax.grad(value_of, has_aux=True)
    if parts == 1:
        return both(trainable, frozen, batch)
    shards = math.prod(axis_size(a) for a in BATCH_AXES)

    def split(x):
        """[B, T, ...] -> [parts, B / parts, T, ...]; every microbatch has rows of every device."""
        x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x.reshape(parts, -1, *x.shape[3:]), None, *TOKENS)

    def sums_of(part):
        grads, metrics = both(trainable, frozen, part)
        return jax.tree.map(lambda x: metrics[LOSS].weight * x, grads), metrics

    def add(total, part):
        return jax.tree.map(jnp.add, total, sums_of(part)), None

    batch = {name: split(x) for name, x in batch.items()}
    shapes = jax.eval_shape(sums_of, {name: x[0] for name, x in batch.items()})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, batch)
    weight = metrics[LOSS].weight
    weight = jnp.where(weight > 0, weight, 1.0)
    return jax.tree.map(lambda x: x / weight, grads), metrics
