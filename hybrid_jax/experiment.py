"""An experiment: a config's phases run from a source to an exported model, each stage resumable.

A working directory holds

    config.json       what is being run; another config in the same directory is refused, but for more steps (see `lengthen`)
    stages/NN_NAME/   a Hugging Face directory of each finished stage, 00_initial first
    checkpoints/NAME/ of the phase under way; of one done, if it has keep_every
    metrics.jsonl, tensorboard/, run.png
    model/            the outcome
    before_lengthening/  outcomes of phases that were given more steps when they had ended
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hybrid_jax.checks import check_choice, check_known
from hybrid_jax.config import ModelConfig
from hybrid_jax.config_file import flat
from hybrid_jax.convert import (
    check_model_directory,
    load_model,
    read_model_config,
    save_model,
    write_model,
)
from hybrid_jax.data import check_tokenizer_fits, load_tokenizer, read_corpus, read_sources
from hybrid_jax.data.corpus import read_tasks
from hybrid_jax.data.documents import load_documents, pieces, split_documents
from hybrid_jax.data.pipeline import sources_of
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.data.tokens import is_prepared
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.fields import fields_of
from hybrid_jax.files import check_new_directory, check_writable, find_shipped, new_directory, write_text
from hybrid_jax.lengthen import lengthen_phases
from hybrid_jax.mixers import options_by_key
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import barrier, is_first, say
from hybrid_jax.parallel.mesh import check_mesh_fits, make_mesh
from hybrid_jax.priming.fuse import check_teacher, fuse, unfuse
from hybrid_jax.priming.initialize import FRESH_PARAMETERS, check_convertible, initialize_hybrid
from hybrid_jax.priming.select import Selection, choose_pattern, pattern_from_scores
from hybrid_jax.train import MetricWriter, NoMetrics, Phase, train_phase
from hybrid_jax.train.phase_layout import trained_names

DIFFERENCES = 5  # of two configs, that a message names


def phases_of_config(config: ConfigDict) -> list[tuple[str, Phase]]:
    """The phases in order, after everything that can be checked without work.

    Raises:
      ValueError: an unknown key, a phase that is not there, or a bad value in one.
    """
    check_known("the config", config, fields_of(config))
    if bool(config.get("source")) == bool(config.get("model")):
        raise ValueError("the config needs either 'source' (a Hugging Face directory) or 'model' (a new model's config.json)")
    absent = [key for key in ("schedule", "phases", "data", "seed") if key not in config]
    if absent or "mix" not in config.data:
        raise ValueError(f"the config lacks {absent[0] if absent else 'data.mix'}; configs/prime_tiny.py is a complete example")
    check_choice("config.fresh_parameters", config.get("fresh_parameters", "transformers"), FRESH_PARAMETERS)
    _check_data(config)
    missing = [name for name in config.schedule if name not in config.phases]
    if missing:
        raise ValueError(f"config.schedule names {missing[0]!r}, config.phases has {', '.join(config.phases) or 'none'}")
    twice = [name for n, name in enumerate(config.schedule) if name in config.schedule[:n]]
    if twice:
        raise ValueError(
            f"config.schedule names {twice[0]!r} twice, but checkpoints and metrics go by the phase's name; add a phase with the "
            "same values under another name to config.phases and schedule that one"
        )
    phases = [(name, Phase.from_config(name, config.phases[name])) for name in config.schedule]
    known = (*read_sources(config.data.to_dict()), *read_tasks(config.data.to_dict()))
    for name, phase in phases:
        mix = mix_of(config, phase)
        try:
            unknown = sorted(set(sources_of(mix)) - set(known))
        except ValueError as e:
            raise ValueError(f"phase {name!r}: {e}") from None
        if unknown:
            raise ValueError(f"phase {name!r} mixes the unknown data source {unknown[0]!r}; known: {', '.join(known)}")
    return phases


def _check_data(config: ConfigDict):
    """Checks that every source of text is there, without reading it."""
    check_known("config.data", config.data, fields_of(config)["data"])
    if config.get("model") and not config.data.get("text"):
        raise ValueError("a new 'model' needs data.text, to train its tokenizer on")
    for source in read_sources(config.data.to_dict()).values():
        if not is_prepared(source.path):
            pieces(source.path)


def _check_phases_fit(model_config: ModelConfig, config: ConfigDict, phases: list[tuple[str, Phase]]):
    """Checks the pattern, or how to select one, and of every phase that it finds the parameters it wants to train and that the
    source can teach it.

    Raises:
      ValueError: the pattern is invalid or converts what is not attention, a phase's pattern of names matches nothing, its rows
        are longer than the model's positions, or the source cannot be the teacher of a fused phase; names the phase.
    """
    pattern, positions = config.get("pattern"), model_config.max_position_embeddings
    if config.get("select"):
        check_known("config.select", config.select, fields_of(config)["select"])
    if not pattern and config.get("select"):
        selection = Selection.from_config(config.select)
        selection.check(model_config)
        pattern = pattern_from_scores([0.0] * model_config.num_layers, selection.mixer, selection.fraction)
    hybrid = model_config.with_pattern(pattern) if pattern else model_config
    check_convertible(model_config, hybrid)
    for name, phase in phases:
        positions = phase.max_position_embeddings or positions
        if phase.seq_len > positions:
            raise ValueError(
                f"phase {name!r}: seq_len {phase.seq_len:,} is more than the model's max_position_embeddings, {positions:,}; "
                "lower it, or set the phase's max_position_embeddings"
            )
        form = {"fused": hybrid.fused, "unfused": hybrid.unfused, "as_is": lambda: hybrid}[phase.form]()
        try:
            if phase.form == "fused":
                check_teacher(form, model_config)
            trained_names(form, phase.trainable)
        except ValueError as e:
            raise ValueError(f"phase {name!r}: {e}") from None


def _claim(workdir: pathlib.Path, config: ConfigDict):
    """Makes the working directory this config's, or checks that it is already; meshes may change, and phases get more steps.

    A run that ended before it made anything, e.g. because its text could not be read, leaves the directory to the next config.

    Raises:
      ValueError: it belongs to another config. PermissionError: it cannot be written any more.
    """
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list)
    record = workdir / "config.json"
    stages = {name: stage_path(workdir, number, name) for number, name in enumerate(config.schedule, start=1)}
    lengthen_phases(record, json.loads(text), stages, lambda old, new: not _differences(old, new))
    if record.exists():
        differences = _differences(json.loads(record.read_text()), json.loads(text))
        if differences and [p.name for p in workdir.iterdir()] == [record.name]:
            say(f"{workdir} has nothing of a run but its config (it ended before its first stage): the new config takes its place")
            write_text(record, text + "\n")
        elif differences:
            more = f" and {len(differences) - DIFFERENCES} more" if len(differences) > DIFFERENCES else ""
            raise ValueError(
                f"{workdir} holds a run of another config: {'; '.join(differences[:DIFFERENCES])}{more} (compare {record}); "
                "choose another --workdir, or remove this one"
            )
        for place in (workdir, workdir / "stages", *(workdir / "checkpoints").glob("*")):
            if place.is_dir():
                check_writable(place)
        return
    check_new_directory(workdir)
    with new_directory(workdir) as directory:
        (directory / "config.json").write_text(text + "\n")


def _without_meshes(config: dict) -> dict:
    phases = {name: {k: v for k, v in phase.items() if k != "mesh"} for name, phase in config["phases"].items()}
    return {k: v for k, v in config.items() if k != "mesh"} | {"phases": phases}


def _differences(old: dict, new: dict) -> list[str]:
    """The fields in which two configs differ, a sentence each, but for meshes and ways to write the same path."""
    old, new = (flat(_without_meshes(_with_absolute_paths(c))) for c in (old, new))
    differ = [name for name in sorted({*old, *new}) if (name in old) != (name in new) or old[name] != new[name]]
    was, now = ({name: repr(c[name]) if name in c else "absent" for name in differ} for c in (old, new))
    return [f"config.{name} is {now[name]} now and was {was[name]}" for name in differ]


def _with_absolute_paths(config: dict) -> dict:
    """The config with the paths of its source and texts made absolute, where something is there; see `find_shipped`."""

    def absolute(path):
        if not isinstance(path, str) or path in ("", "stdlib") or path.startswith("hf:"):
            return path
        found = find_shipped(path)
        return str(found.absolute()) if found.exists() else path

    def within(values, *keys):
        return {**values, **{k: absolute(values[k]) for k in keys if k in values}} if isinstance(values, dict) else values

    config = within(config, "source")
    if isinstance(data := config.get("data"), dict):
        config["data"] = data = within(data, "text")
        if isinstance(data.get("sources"), dict):
            data["sources"] = {name: within(source, "path") for name, source in data["sources"].items()}
    return config


def _new_source(config: ConfigDict, directory: pathlib.Path):
    """A randomly initialized model with a tokenizer of its own, trained on the experiment's text."""
    model_config = config_from_hf(config.model.to_dict())
    train, _ = split_documents(load_documents(config.data.text))
    tokenizer = train_tokenizer((d.text for d in train), model_config.vocab_size)
    if tokenizer.get_vocab_size() != model_config.vocab_size:
        raise ValueError(
            f"the text yields a vocabulary of {tokenizer.get_vocab_size()}, model.vocab_size is {model_config.vocab_size}"
        )
    with new_directory(directory) as d:
        write_model(Decoder(model_config, rngs=nnx.Rngs(config.seed)), d)
        save_tokenizer(tokenizer, d, model_config.max_position_embeddings)


def _with_mixer_options(model_config: ModelConfig, options: dict) -> ModelConfig:
    """The model with the experiment's `mixers` (swa_config and the like) in place of its own."""
    check_known("config.mixers", options, options_by_key())
    return config_from_hf({**config_to_hf(model_config), **options})


def stage_path(workdir: pathlib.Path, number: int, name: str) -> pathlib.Path:
    return workdir / "stages" / f"{number:02d}_{name}"


def run_experiment(config: ConfigDict, workdir: str | pathlib.Path, profile: tuple[int, int] | None = None) -> pathlib.Path:
    """Runs a config, or what is left of it.

    Args:
      config: `source` or `model`; `pattern`, `select`, `mixers`, `fresh_parameters` (how weights that attention does not
        give start, see `initialize_hybrid`) for a hybrid; `schedule` (names, in order) and
        `phases` (by name, see `Phase`); `data` (`mix`, and `text` or `sources`, see `data.corpus`); `seed`;
        `mesh` (axis -> size, see `parallel.mesh`), absent for one device.
      workdir: where everything goes; of several processes all must see it.
      profile: first and last step of each phase to trace, into `profile/PHASE`.

    Returns:
      The directory of the exported model.

    Raises:
      ValueError, FileNotFoundError, PermissionError, FileExistsError: bad input, before any work.
      Stopped: asked to stop; state saved.
    """
    config = ConfigDict(_with_absolute_paths(config.to_dict()))
    workdir, phases = pathlib.Path(workdir), phases_of_config(config)
    source_config = check_model_directory(config.source) if config.get("source") else config_from_hf(config.model.to_dict())
    mixers = config.get("mixers", ConfigDict()).to_dict()
    _check_phases_fit(_with_mixer_options(source_config, mixers), config, phases)
    meshes = [mesh_of(config, phase) for _, phase in phases] or [mesh_of(config)]
    for mesh, (_, phase) in zip(meshes, phases, strict=False):
        if mesh is not None:
            check_mesh_fits(source_config, mesh, phase.rows_at_a_time, phase.seq_len)
    if config.get("source"):
        check_tokenizer_fits(load_tokenizer(config.source), source_config.vocab_size, config.source)
    for number, (name, phase) in enumerate(phases, start=1):
        if phase.teacher_cache and not stage_path(workdir, number, name).exists():
            described = phase.described_rows(mix_of(config, phase), config.seed + number)
            TeacherCache(phase.teacher_cache, **described).check(phase.steps)
    if is_first():
        _claim(workdir, config)
        for leftover in (workdir / "stages").glob(".*"):  # of a killed run
            shutil.rmtree(leftover)
    barrier("claimed")
    out = workdir / "model"
    if out.exists():
        say(f"done already: {out}")
        return out

    initial = stage_path(workdir, 0, "initial")
    fresh = config.get("model") and not initial.exists()
    barrier("looked for a source")
    if fresh and is_first():
        _new_source(config, initial)
    barrier("made the source")
    source = pathlib.Path(config.get("source") or initial)
    corpus = read_corpus(config.data.to_dict(), source, read_model_config(source).extra.get("eos_token_id"))
    if not initial.exists():
        model = load_model(source, dtype=jnp.float32, mesh=meshes[0])
        model.config = _with_mixer_options(model.config, mixers)
        pattern = choose_pattern(model, config.get("pattern", ""), config.get("select"), corpus, workdir)
        options = dict(seed=config.seed, mesh=meshes[0], fresh_parameters=config.get("fresh_parameters", "transformers"))
        save_model(initialize_hybrid(model, pattern, **options), initial, tokenizer_from=source)

    before = initial
    with contextlib.closing(MetricWriter(workdir) if is_first() else NoMetrics()) as writer:
        for number, (name, phase) in enumerate(phases, start=1):
            stage, mesh = stage_path(workdir, number, name), meshes[number - 1]
            checkpoints = workdir / "checkpoints" / name
            if not stage.exists():
                where = dict(directory=checkpoints, writer=writer, mesh=mesh, profile=profile)
                teacher = functools.partial(load_model, source, dtype=jnp.float32, mesh=mesh)
                model = train_phase(
                    # not held here, so that the loop may free it
                    in_form(load_model(before, dtype=jnp.float32, mesh=mesh), phase.form, source, mesh),
                    name,
                    phase,
                    corpus,
                    mix_of(config, phase),
                    seed=config.seed + number,
                    teacher=teacher,
                    **where,
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


def mix_of(config: ConfigDict, phase: Phase) -> dict[str, float]:
    """The phase's own shares of the sources, or the experiment's."""
    return dict(phase.mix) or config.data.mix.to_dict()


def mesh_of(config: ConfigDict, phase: Phase | None = None) -> Mesh | None:
    """The phase's own mesh, or the experiment's; None: one device."""
    sizes = (phase and phase.mesh) or config.get("mesh")
    return make_mesh(dict(sizes)) if sizes else None


def in_form(model: Decoder, form: str, source: pathlib.Path, mesh: Mesh | None) -> Decoder:
    """The model in a phase's form. A fused one gets the source's attention; the loop makes the source itself its teacher."""
    if form == "unfused":
        return unfuse(model)
    if form == "fused" and not model.config.is_fused:
        return fuse(model, load_model(source, dtype=jnp.float32, mesh=mesh))
    return model
