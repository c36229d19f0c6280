"""An experiment: a config's phases run from a source to an exported model, each stage resumable."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hybrid_jax.claim import claim, stage_path
from hybrid_jax.convert import load_model, read_model_config, save_model, write_model
from hybrid_jax.data import read_corpus
from hybrid_jax.data.documents import load_documents, split_documents
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.families import config_from_hf
from hybrid_jax.files import new_directory
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import barrier, is_first, say
from hybrid_jax.priming.fuse import fuse, unfuse
from hybrid_jax.priming.initialize import initialize_hybrid, new_model
from hybrid_jax.selection.select import choose_pattern
from hybrid_jax.train import MetricWriter, NoMetrics, Phase, train_phase

# Keys of a source's config.json that only its own training used.
NOT_APPLIED = (
    "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "router_jitter_noise",
    "output_router_logits",  # true: transformers adds `router_aux_loss_coef` times a loss that balances the experts
)  # fmt: skip


def _make_source(experiment: Experiment, directory: pathlib.Path) -> None:
    """Writes a randomly initialized model of the experiment's pattern, with a tokenizer of its own, trained on the text.

    Raises:
      ValueError: the text is too short for a vocabulary of the model's size.
    """
    model_config = config_from_hf(dict(experiment.model))
    train, _ = split_documents(load_documents(experiment.data["text"]))
    tokenizer = train_tokenizer((d.text for d in train), model_config.vocab_size)
    if tokenizer.get_vocab_size() != model_config.vocab_size:
        raise ValueError(
            f"the text yields a vocabulary of {tokenizer.get_vocab_size()}, model.vocab_size is {model_config.vocab_size}"
        )
    with new_directory(directory) as d:
        config = experiment.with_mixer_options(model_config).with_pattern(experiment.pattern or model_config.pattern)
        write_model(new_model(config, seed=experiment.seed, fresh_parameters=experiment.fresh_parameters), d)
        save_tokenizer(tokenizer, d, model_config.max_position_embeddings)


def run_experiment(config: ConfigDict, workdir: str | pathlib.Path, profile: tuple[int, int] | None = None) -> pathlib.Path:
    """Runs a config, or what is left of it.

    Args:
      config: see `Experiment`.
      workdir: where everything goes (see `claim`); of several processes all must see it.
      profile: first and last step of each phase to trace, into `profile/PHASE`.

    Returns:
      The directory of the exported model.

    Raises:
      ValueError, FileNotFoundError, PermissionError, FileExistsError: bad input, before any work.
      Stopped: asked to stop; state saved.
    """
    experiment, workdir = Experiment.from_config(config), pathlib.Path(workdir)
    stages = {name: stage_path(workdir, number, name) for number, (name, _) in enumerate(experiment.phases, start=1)}
    experiment.check_source()
    experiment.check_teacher_caches({name: stage.exists() for name, stage in stages.items()})
    meshes = experiment.meshes()
    if is_first():
        claim(workdir, experiment.record)
        for leftover in (workdir / "stages").glob(".*"):  # of a killed run
            shutil.rmtree(leftover)
    barrier("claimed")
    out = workdir / "model"
    if out.exists():
        say(f"done already: {out}")
        return out

    initial = stage_path(workdir, 0, "initial")
    fresh = not experiment.source and not initial.exists()
    barrier("looked for a source")
    if fresh and is_first():
        _make_source(experiment, initial)
    barrier("made the source")
    source = pathlib.Path(experiment.source) if experiment.source else initial
    extra = read_model_config(source).extra
    if ignored := [f"{key} = {extra[key]}" for key in NOT_APPLIED if extra.get(key)]:
        say(f"not applied in training, though config.json has them: {', '.join(ignored)}")
    corpus = read_corpus(experiment.data, source, extra.get("eos_token_id"))
    if not initial.exists():
        model = load_model(source, dtype=jnp.float32, mesh=meshes[0])
        model.config = experiment.with_mixer_options(model.config)
        pattern = choose_pattern(model, experiment.pattern, experiment.select, corpus, workdir, meshes[0])
        hybrid = initialize_hybrid(model, pattern, seed=experiment.seed, mesh=meshes[0], **experiment.begin)
        save_model(hybrid, initial, tokenizer_from=source)
        del model, hybrid

    before = initial
    with contextlib.closing(MetricWriter(workdir) if is_first() else NoMetrics()) as writer:
        for number, (name, phase) in enumerate(experiment.phases, start=1):
            stage, mesh, checkpoints = stages[name], meshes[number - 1], workdir / "checkpoints" / name
            if not stage.exists():
                if phase.pattern:
                    say(f"{name}: the model becomes {phase.pattern}")
                model = train_phase(
                    # not held here, so that the loop may free it
                    begin_phase(load_model(before, dtype=jnp.float32, mesh=mesh), experiment, number, phase, source, mesh),
                    name,
                    phase,
                    corpus,
                    experiment.mix_of(phase),
                    seed=experiment.seed + number,
                    teacher=functools.partial(load_model, phase.teacher or source, dtype=jnp.float32, mesh=mesh),
                    directory=checkpoints,
                    writer=writer,
                    mesh=mesh,
                    profile=profile,
                )
                save_model(model, stage, tokenizer_from=source)
                del model
            if is_first() and not (phase.keep_every or phase.keep_best):
                shutil.rmtree(checkpoints, ignore_errors=True)
            before = stage
    save_model(unfuse(load_model(before, mesh=meshes[-1])), out, tokenizer_from=source)
    if is_first():
        from hybrid_jax.run_report import report_run  # it draws: a second that no other process and no start need spend

        report_run(workdir)
    return out


def begin_phase(
    model: Decoder, experiment: Experiment, number: int, phase: Phase, source: pathlib.Path, mesh: Mesh | None
) -> Decoder:
    """Returns the model with which a phase begins: in the phase's pattern, and in its form.

    Layers that the pattern does not convert are as they were. A fused model gets the source's mixers; the loop makes the source
    its teacher. The same arguments give the same model, so that a run which was stopped within the phase needs no record of it.

    Args:
      model: what the phase before left.
      experiment: how mixers begin; only what `Experiment.of_conversions` has is read.
      number: of the phase, from 1.
      source: the directory of the teacher.
      mesh: of the model; None: one device.
    """
    fused = phase.keeps_teachers(model.config)
    if phase.pattern:
        model = unfuse(model)
        model.config = experiment.with_mixer_options(model.config)
        model = initialize_hybrid(model, phase.pattern, seed=experiment.seed + number, mesh=mesh, **experiment.begin)
    if not fused:
        return unfuse(model)
    return model if model.config.is_fused else fuse(model, load_model(source, dtype=jnp.float32, mesh=mesh))
