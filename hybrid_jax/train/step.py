"""The jitted training step: gradients of the parts of a batch put together, the update, and what is not let in.

A step whose loss or gradient is not finite, or one of which is a spike, changes nothing but `Health`. The learning rate
follows the steps of the phase, skipped ones too; the optimizer's moments and their bias corrections only those that counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from hybrid_jax.data.layout import SOURCE
from hybrid_jax.parallel.mesh import BATCH_AXES
from hybrid_jax.parallel.sharding import TOKENS, axis_size, constrain
from hybrid_jax.train.checkpoint import Health, TrainState
from hybrid_jax.train.metrics import gradient_norms
from hybrid_jax.train.objectives import PER_TOKEN, make_objective
from hybrid_jax.train.optimizer import learning_rate_schedule
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout

WEIGHT = "weight"  # of the metrics: what the step's loss is a mean over
SOURCE_SUMS = "source_sums"  # of the metrics: [sources, 2], of every source its tokens' weighted losses and their weights
STOP = "stop_asked"  # of a batch: whether a process was asked to stop; the metric of that name tells all of them
DECAY, TRUSTED = 0.98, 20  # of the running means of loss and gradient norm; steps before it is relied on


def make_step(layout: PhaseLayout, phase: Phase, shardings: TrainState | None = None, sources: Sequence[str] = ()):
    """(state, frozen, batch) -> (the next state, metrics), jitted; the state is donated.

    Frozen parameters have neither gradients nor optimizer state. The metrics are means over the step, `learning_rate` the one
    it was taken with; `skipped` and `skipped_in_a_row` are counts.

    Args:
      shardings: of the state, which the next one keeps.
      sources: of the batch's rows, by number (see `data.layout.SOURCE`); the metrics then have `SOURCE_SUMS`.
    """
    objective, schedule = make_objective(phase.objective, phase.options), learning_rate_schedule(phase)

    def loss_of(trainable, frozen, batch):
        model, teacher = layout.models(trainable, frozen)
        loss, metrics = objective(model, batch, teacher)
        per_token = metrics.pop(PER_TOKEN, None)
        if sources and per_token is not None:
            metrics[SOURCE_SUMS] = _sums_by_source(*per_token, batch[SOURCE], len(sources))
        return loss, metrics

    def step(state: TrainState, frozen, batch):
        batch = dict(batch)
        asked = {STOP: jnp.max(batch.pop(STOP))} if STOP in batch else {}
        grads, metrics = gradients_of(loss_of, state.trainable, frozen, batch, phase.accumulate)
        norms = gradient_norms(grads)
        health, good = _judge(state.health, metrics["loss"], norms["grad_norm"], phase.spike)
        directions, optimizer = layout.optimizer.update(grads, state.optimizer, state.trainable)
        rate = jnp.float32(schedule(state.health.steps + state.health.skipped))
        updates = jax.tree.map(lambda x: -rate * x, directions)
        new = TrainState(optax.apply_updates(state.trainable, updates), optimizer, health)
        kept = jax.tree.map(lambda old, new: jnp.where(good, new, old), state[:2], new[:2])
        metrics |= {**norms, **asked, "learning_rate": rate, "skipped": health.skipped, "skipped_in_a_row": health.in_a_row}
        return TrainState(*kept, health), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _judge(health: Health, loss, norm, spike: float) -> tuple[Health, jax.Array]:
    """What is known of the run after this step, and whether the step counts."""
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


def _sums_by_source(losses, weights, source, count: int) -> jax.Array:
    own = source[None] == jnp.arange(count)[:, None, None]
    return jnp.stack([jnp.sum(jnp.where(own, x, 0), axis=(1, 2)) for x in (losses * weights, weights)], axis=-1)


def gradients_of(loss_of, trainable, frozen, batch, parts: int):
    """Gradients and metrics of the batch, from its parts one after the other, each weighing what its loss is a mean over."""
    both = jax.grad(loss_of, has_aux=True)
    if parts == 1:
        return both(trainable, frozen, batch)
    shards = math.prod(axis_size(a) for a in BATCH_AXES)

    def cut(x):
        """Part p has rows of every device."""
        x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x.reshape(parts, -1, *x.shape[3:]), None, *TOKENS)

    def sums_of(part):
        grads, metrics = both(trainable, frozen, part)
        sums = {name: metrics.pop(name) for name in (WEIGHT, SOURCE_SUMS) if name in metrics}
        return *jax.tree.map(lambda x: sums[WEIGHT] * x, (grads, metrics)), sums

    def add(total, part):
        return jax.tree.map(jnp.add, total, sums_of(part)), None

    batch = {name: cut(x) for name, x in batch.items()}
    shapes = jax.eval_shape(sums_of, {name: x[0] for name, x in batch.items()})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics, sums), _ = jax.lax.scan(add, zeros, batch)
    weight = jnp.where(sums[WEIGHT] > 0, sums[WEIGHT], 1.0)
    grads, metrics = jax.tree.map(lambda x: x / weight, (grads, metrics))
    return grads, {**metrics, **sums}
