"""The one loop that runs every phase of every method."""

from __future__ import annotations

import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hybrid_jax.data import Corpus, training_batches
from hybrid_jax.data.layout import training_batch
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.mesh import check_mesh_fits
from hybrid_jax.parameters import count, join_model, split_model
from hybrid_jax.stopped import Stopped
from hybrid_jax.train.arrangement import Arrangement
from hybrid_jax.train.checkpoint import Checkpoints, TrainState
from hybrid_jax.train.metrics import MetricWriter, progress_bar
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.optimizer import learning_rate_schedule
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.placement import in_mesh, own_rows, to_mesh


class _StopRequest:
    """Turns SIGINT and SIGTERM into a flag for the time of a phase."""

    def __enter__(self):
        self.asked, self.previous = False, {}
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                self.previous[s] = signal.signal(s, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def make_step(arrangement: Arrangement, phase: Phase, shardings: TrainState | None = None):
    """The jitted step: (trainable, optimizer state), frozen, batch -> the next state, metrics.

    Frozen parameters have neither gradients nor optimizer state.

    Args:
      shardings: of the state, which the next one keeps.
    """
    objective, optimizer, structure = OBJECTIVES[phase.objective], arrangement.optimizer, arrangement.structure

    def loss_fn(trainable, frozen, batch):
        return objective(join_model(structure, {**trainable, **frozen}), batch)

    def step(state: TrainState, frozen, batch):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable, frozen, batch)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(optax.apply_updates(state.trainable, updates), optimizer_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def train_phase(
    model: Decoder,
    name: str,
    phase: Phase,
    corpus: Corpus,
    mix: dict,
    *,
    seed: int,
    directory: pathlib.Path,
    writer: MetricWriter,
    mesh: Mesh | None = None,
) -> Decoder:
    """Runs a phase from its start or its newest checkpoint.

    Args:
      model: the model in the phase's form.
      directory: where this phase's checkpoints live.
      mesh: what to spread it over; the model's parameters lie there already.

    Returns:
      The trained model.

    Raises:
      Stopped: on SIGINT or SIGTERM, after saving.
      FloatingPointError: the loss is not finite; names the step.
      ValueError: a pattern of `phase.trainable` matches nothing.
    """
    model.compute_dtype, model.remat = jnp.dtype(phase.compute_dtype), phase.remat
    if mesh is not None:
        check_mesh_fits(model.config, mesh, phase.batch_size, phase.seq_len)
    arrangement = Arrangement(model, phase)
    whole, parameters = split_model(model)
    total, training = count(parameters), count(arrangement.split(parameters)[0])
    del model  # its arrays go as soon as the caller lets them
    state, frozen, shardings = arrangement.begin(mesh, parameters)
    del parameters
    print(
        f"{name}: {phase.objective}, {phase.steps} steps of {phase.tokens_per_step:,} tokens; "
        f"training {training:,} of {total:,} parameters",
        flush=True,
    )
    rows = own_rows(mesh, phase.batch_size)
    batches = training_batches(
        corpus,
        mix,
        batch_size=phase.batch_size,
        length=phase.seq_len,
        seed=seed,
        answer_weight=phase.answer_weight,
        rows=rows,
    )
    checkpoints = Checkpoints(directory)
    done = checkpoints.latest() or 0
    if done:
        state, data_state = checkpoints.restore(done, state)
        batches.set_state(data_state)
        print(f"{name}: resumed at step {done}", flush=True)
    step_fn, schedule = make_step(arrangement, phase, shardings), learning_rate_schedule(phase)
    seq_devices = 1 if mesh is None else mesh.shape["seq"]
    begun, begun_at = time.perf_counter(), done
    with in_mesh(mesh), _StopRequest() as stop, progress_bar(name, phase.steps, done) as bar:
        while done < phase.steps:
            state, metrics = step_fn(
                state, frozen, to_mesh(mesh, training_batch(next(batches), seq_devices), phase.batch_size, rows)
            )
            done += 1
            bar.update()
            last = done == phase.steps
            if done % phase.log_every == 0 or last or done == 1:
                values = {k: float(whole_array(v)) for k, v in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"{name}: the loss is {values['loss']} at step {done}; the last checkpoint is step "
                        f"{checkpoints.latest()}. Lower phase.learning_rate, or look at the data of this step"
                    )
                speed = (done - begun_at) * phase.tokens_per_step / (time.perf_counter() - begun)
                values |= {"learning_rate": float(schedule(done - 1)), "tokens_per_second": speed}
                writer.write(name, done, values)
                bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:,.0f} tok/s")
            if done % phase.checkpoint_every == 0 or last or stop.asked:
                checkpoints.save(done, state, batches.get_state())
            if stop.asked and not last:
                checkpoints.close()
                raise Stopped(f"{name}: stopped and saved at step {done} of {phase.steps}; the same command resumes")
    checkpoints.close()
    return join_model(whole, arrangement.parameters(state, frozen))
