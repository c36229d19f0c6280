"""The one loop that runs every phase of every method."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybrid_jax.data import Corpus, training_batches
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.pipeline import sources_of
from hybrid_jax.data.teacher_cache import RECORD, TeacherCache, shortened
from hybrid_jax.files import file_hash
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import of_every_process, say, whole_array
from hybrid_jax.parallel.mesh import check_mesh_fits
from hybrid_jax.parallel.placement import any_process_flag, in_mesh, own_rows, to_mesh
from hybrid_jax.parameters import count, join_model, split_model, with_config
from hybrid_jax.priming.fuse import share, teacher_stream, unfuse
from hybrid_jax.stopped import Stopped, StopRequest
from hybrid_jax.train.cache import teacher_fingerprint
from hybrid_jax.train.checkpoint import Checkpoints
from hybrid_jax.train.diagnose import first_bad
from hybrid_jax.train.evaluation import LOSS as HELD_OUT_LOSS
from hybrid_jax.train.evaluation import Evaluation
from hybrid_jax.train.hook import EVAL, Hook, StepView, call
from hybrid_jax.train.hooks import make_hooks
from hybrid_jax.train.interval import LATEST, Interval
from hybrid_jax.train.meter import Meter
from hybrid_jax.train.metrics import MetricWriter, NoMetrics, progress_bar
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.profile import Profile
from hybrid_jax.train.step import STOP, make_step
from hybrid_jax.train.teacher import teach_student_ids


def apply_phase_settings(model: Decoder, phase: Phase) -> Decoder:
    """The model with what the phase says of it: compute dtype, rematerialization, RoPE, context length."""
    config = model.config
    if phase.rope_theta:
        config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=phase.rope_theta))
    if phase.max_position_embeddings:
        config = dataclasses.replace(config, max_position_embeddings=phase.max_position_embeddings)
    if config is not model.config:
        model = with_config(model, config)
    model.compute_dtype, model.remat = jnp.dtype(phase.compute_dtype), phase.remat
    return model


def _source(model: Decoder, phase: Phase, teacher: Callable[[], Decoder] | None) -> Decoder | None:
    """Who teaches in the phase, sharing what it can with the model; the reference is the model as it is here, as the phase begins.

    None: nobody, the objective has neither.
    """
    if OBJECTIVES[phase.objective].reference:
        return unfuse(model)
    if not OBJECTIVES[phase.objective].two_streams:
        return None
    if phase.teacher:
        if teacher is None:
            raise ValueError(f"phase.teacher is {phase.teacher}; train_phase needs the function `teacher` that loads it")
        return teach_student_ids(teacher(), model.config)
    return teacher_stream(model) if teacher is None else share(teacher_stream(teacher()), model, phase.frozen_dtype)


def _check_same(name: str, step: int, saved: Mapping, made_of: Mapping):
    """Checks that a phase goes on with the rows and the teacher that it began with.

    Raises:
      ValueError: it does not; names the first difference.
    """
    for key in sorted({*saved, *made_of}):
        if saved.get(key) != made_of.get(key):
            raise ValueError(
                f"{name}: up to its checkpoint of step {step} the phase had {key} = {shortened(saved.get(key))}, now it is "
                f"{shortened(made_of.get(key))}: the text, the tokenizer or the teacher has been replaced. Put back what was "
                "there, or choose another --workdir"
            )


def progress_text(values: dict[str, float]) -> str:
    """The few numbers beside the progress bar."""
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if HELD_OUT_LOSS in values:
        parts.append(f"held-out {values[HELD_OUT_LOSS]:.4f}")
    if values.get("skipped"):
        parts.append(f"{values['skipped']:.0f} steps skipped")
    return ", ".join(parts)


def train_phase(
    model: Decoder,
    name: str,
    phase: Phase,
    corpus: Corpus,
    mix: dict,
    *,
    seed: int,
    directory: pathlib.Path,
    writer: MetricWriter | NoMetrics,
    mesh: Mesh | None = None,
    profile: tuple[int, int] | None = None,
    teacher: Callable[[], Decoder] | None = None,
    hooks: Sequence[Hook] = (),
) -> Decoder:
    """Runs a phase from its start or its newest checkpoint.

    Args:
      model: the model in the phase's form.
      directory: where this phase's checkpoints live.
      mesh: what to shard it over; the model's parameters are on it already.
      profile: first and last step to trace, into `directory`'s neighbour `profile`.
      teacher: makes the source, which teaches where the objective compares two streams, in its place on the mesh; default: the
        model's own teacher stream as it is here. It does not change, and takes neither RoPE nor context length from the phase.
        Where the phase names a teacher, it makes that one.
      hooks: called after the built-in evaluation and the hooks of `phase.hooks`; see `train.hook`.

    Returns:
      The trained model.

    Raises:
      Stopped: on SIGINT or SIGTERM, after saving.
      FloatingPointError: too many steps in a row were bad; names the steps and where the numbers went bad.
      ValueError: a pattern of `phase.trainable` matches nothing, no checkpoint can be read, or the checkpoint's rows or teacher
        were others.
      FileNotFoundError: the teacher's cache ends before the phase does.
    """
    source = _source(model, phase, teacher)
    model, phase = apply_phase_settings(model, phase), phase.in_steps(corpus, mix, seed)
    if mesh is not None:
        other = source.config if source is not None and phase.teacher else None
        check_mesh_fits(model.config, mesh, phase.rows_at_a_time, phase.seq_len, other)
    layout, meter = PhaseLayout(model, phase, source), Meter(phase, model, source)
    structure, parameters = split_model(model)
    total, training = count(parameters), count(layout.split(parameters)[0])
    taught, made_of = {}, {}
    if source is not None:
        taught, made_of = split_model(source)[1], {"teacher": teacher_fingerprint(source)}
    copied = count(layout.copies(taught))
    del model, source  # their arrays go as soon as the caller lets them
    state, frozen, shardings = layout.begin(mesh, parameters, taught)
    del parameters, taught
    objective = OBJECTIVES[phase.objective]
    whose = "reference" if objective.reference else "teacher"
    say(
        f"{name}: {phase.objective}, {phase.steps:,} steps of {phase.tokens_per_step:,} tokens; "
        f"training {training:,} of {total:,} parameters" + (f", the {whose} keeps {copied:,} of its own" if copied else "")
    )
    rows = own_rows(mesh, phase.batch_size)
    described = phase.described_rows(mix, seed)
    if phase.teacher_cache:
        TeacherCache(phase.teacher_cache, **described).check(phase.steps)
        made_of["teacher_cache"] = file_hash(pathlib.Path(phase.teacher_cache) / RECORD)
    batches = training_batches(
        corpus, **described, rows=rows, teacher_cache=phase.teacher_cache, steps=phase.steps, pairs=objective.pairs
    )
    made_of |= corpus.identity(mix)
    checkpoints, interval = Checkpoints(directory, phase.keep, phase.keep_every), Interval()
    hooks = [*([Evaluation(phase, corpus, mix, mesh)] if phase.eval_every else ()), *make_hooks(phase.hooks), *hooks]
    best, held_out = {"step": 0, "loss": math.inf}, {}
    done = saved = 0
    if (found := checkpoints.restore_latest(state)) is not None:
        done, state, saved_beside = found
        saved = done
        _check_same(name, done, saved_beside["made_of"], made_of)
        batches.set_state(saved_beside["rows"])
        interval.set_state(saved_beside["interval"])
        best = saved_beside.get("best") or best
        checkpoints.best = best["step"]
        for hook in hooks:
            hook.set_state(saved_beside.get("hooks", {}).get(hook.name, {}))
        say(f"{name}: resumed at step {done}")
    step_fn = make_step(layout, phase, shardings, sources_of(mix))
    seq_devices = 1 if mesh is None else mesh.shape["seq"]

    def read_metrics_of(step, metrics, batch, sums):
        """At a step's outcome, while the next one runs; whether some process had been asked to stop before it.

        `sums` are of the interval that the step ends, if it ends one.
        """
        if int(whole_array(metrics["skipped_in_a_row"])) >= phase.bad_steps:
            trained = join_model(structure, layout.parameters(state, frozen))
            where = first_bad(trained, batch, layout.source(state, frozen))
            loss, norm = (float(whole_array(x)) for x in (metrics["loss"].value, metrics["grad_norm"]))
            raise FloatingPointError(
                f"{name}: {phase.bad_steps} steps in a row were bad, the last is step {step} (loss {loss:.4g}, gradient norm "
                f"{norm:.4g}); {where}. Nothing of them was kept; the last checkpoint is step {saved}. Lower "
                "phase.learning_rate, or look at the data of these steps"
            )
        if sums is not None:
            latest = {name: float(whole_array(metrics[name])) for name in LATEST}
            values = {**interval.means(sums), **latest, **meter.read(step)}
            writer.write(name, step, values)
            bar.set_postfix_str(progress_text({**values, **held_out}))
        meter.begin(step)
        return bool(whole_array(metrics[STOP]))

    pending, told_to = None, False
    tracing = Profile(profile, directory.parent.parent / "profile" / name)
    with in_mesh(mesh), StopRequest(name) as stop, progress_bar(name, phase.steps, done) as bar, tracing:
        while done < phase.steps:
            with meter.waiting():
                batch = training_batch(next(batches), seq_devices)
            batch = {**to_mesh(mesh, batch, phase.batch_size, rows), STOP: any_process_flag(mesh, stop.asked)}
            meter.count(state, frozen, batch)
            tracing.before(done + 1)
            state, metrics = step_fn(state, frozen, batch)
            done += 1
            tracing.after(done, metrics)
            interval.add(metrics)
            if pending is not None:
                told_to |= read_metrics_of(*pending)  # one step late, but the same for every process
            stopping = told_to if jax.process_count() > 1 else stop.asked
            last = done == phase.steps
            logged = done % phase.log_every == 0 or done == 1 or last
            pending = (done, metrics, batch, interval.take() if logged else None)
            bar.update()
            due, improved = [hook for hook in hooks if done % hook.every == 0 or last], False
            if due:
                told_to |= read_metrics_of(*pending)  # so that a bad step ends the phase before it is evaluated
                pending, stopping = None, stopping or told_to
                view = StepView(name, phase, corpus, done, mesh, state, frozen, layout)
                with meter.paused():
                    values = call(due, view)
                del view
                improved = phase.keep_best and values.get(HELD_OUT_LOSS, math.inf) < best["loss"]
                if improved:
                    best = {"step": done, "loss": values[HELD_OUT_LOSS]}
                    checkpoints.best = done
                if phase.keep_best and best["step"]:
                    values[f"{EVAL}/best_step"] = float(best["step"])
                held_out = {n: values[n] for n in (HELD_OUT_LOSS,) if n in values}
                writer.write(name, done, values)
            if done % phase.checkpoint_every == 0 or last or stopping or improved:
                if pending is not None:
                    told_to |= read_metrics_of(*pending)  # so that what is saved has been logged
                    pending = None
                beside = {"rows": batches.get_state(), "interval": interval.state(), "made_of": made_of}
                if best["step"]:  # infinity is not JSON
                    beside["best"] = best
                if hooks:
                    beside["hooks"] = {hook.name: hook.state() for hook in hooks}
                checkpoints.save(done, state, beside)
                saved, stopping = done, stopping or told_to
            if stopping:
                break
        checkpoints.close()
        if any(of_every_process(stop.asked)):  # also where the request came during the last step, or while it was saved
            raise Stopped(f"{name}: stopped and saved at step {done} of {phase.steps}; the same command resumes")
    return join_model(structure, layout.parameters(state, frozen))
