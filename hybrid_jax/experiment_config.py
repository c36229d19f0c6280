"""An experiment's config as one typed, checked object."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_known
from hybrid_jax.config import ModelConfig
from hybrid_jax.convert import check_model_directory
from hybrid_jax.data import HELD_OUT_SEED, check_same_ids, check_tokenizer_fits, load_tokenizer, read_sources, read_tasks
from hybrid_jax.data.corpus import check_sources
from hybrid_jax.data.pipeline import sources_of
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.fields import fields_of
from hybrid_jax.files import find_shipped
from hybrid_jax.mixers import options_by_key
from hybrid_jax.parallel.mesh import check_mesh_fits, make_mesh
from hybrid_jax.parameters import abstract_parameters
from hybrid_jax.priming.fresh import FRESH_PARAMETERS
from hybrid_jax.priming.fuse import check_teacher
from hybrid_jax.priming.initialize import check_convertible
from hybrid_jax.selection.select import Selection
from hybrid_jax.train import Phase
from hybrid_jax.train.phase_layout import trained_names
from hybrid_jax.train.teacher import cached_teacher, with_student_ids


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config says, after every check that needs neither a model nor text. Made by `from_config`.

    Attributes:
      source: directory of the model that is converted; empty if there is `model`.
      model: config.json of a new model, which starts at random with a tokenizer of its own; empty if there is `source`.
      pattern: the hybrid's pattern; empty: what `select` chooses, or else the source's own.
      select: how a pattern is chosen; None if there is a pattern or nothing to choose.
      mixers: options of mixers by their keys in config.json (`swa_config`, ...), each in place of the source's.
      fresh_parameters: how parameters start that attention does not give, see `initialize_hybrid`.
      copy_attention: whether recurrent mixers begin with the weights of the layer's mixer, see `initialize_hybrid`.
      phases: (name, phase) in order.
      data: `text`, `sources`, `tasks` (see `data.corpus`) and `mix` (source -> share of the rows).
      seed: of everything random; phase number n (from 1) takes seed + n.
      mesh: mesh axis -> devices, for phases without their own; empty: one device.
      record: the config itself in JSON's types, paths absolute.
    """

    source: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pattern: str = ""
    select: Selection | None = None
    mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fresh_parameters: str = "transformers"
    copy_attention: bool = True
    phases: tuple[tuple[str, Phase], ...] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_config(cls, config: ConfigDict, *, with_data: bool = True) -> Experiment:
        """Returns the experiment that a config describes.

        Args:
          config: the fields named in this class (`fields.fields_of` lists all); `schedule`, the names of the phases in order; and
            `phases`, the fields of each `Phase` by its name.
          with_data: whether the sources of text must be there; a plan needs none of them.

        Raises:
          ValueError: an unknown or missing field, or a bad value; names it. FileNotFoundError: a source of text is not there.
        """
        values = config.to_dict()
        fields = fields_of(values)
        check_known("the config", values, fields)
        if bool(values.get("source")) == bool(values.get("model")):
            raise ValueError("the config needs either 'source' (a Hugging Face directory) or 'model' (a new model's config.json)")
        absent = [key for key in ("schedule", "phases", "data", "seed") if key not in values]
        if absent or "mix" not in values["data"]:
            raise ValueError(f"the config lacks {absent[0] if absent else 'data.mix'}; configs/prime_tiny.py is a complete example")
        fresh = values.get("fresh_parameters", "transformers")
        check_choice("config.fresh_parameters", fresh, FRESH_PARAMETERS)
        copies = check_boolean("config.copy_attention", values.get("copy_attention", True))
        if not copies and values.get("model"):
            raise ValueError("config.copy_attention is of conversions; config.model is a new model, which has no attention to copy")
        record = with_absolute_paths(values)
        data = record["data"]
        _check_data(data, fields["data"], new_model=bool(values.get("model")))
        if with_data:
            check_sources(data)
        phases = _phases(record)
        known = (*read_sources(data), *read_tasks(data))
        for name, phase in phases:
            mix = dict(phase.mix) or data["mix"]
            try:
                unknown = sorted(set(sources_of(mix)) - set(known))
            except ValueError as e:
                raise ValueError(f"phase {name!r}: {e}") from None
            if unknown:
                raise ValueError(f"phase {name!r} mixes the unknown data source {unknown[0]!r}; known: {', '.join(known)}")
        mixers = values.get("mixers") or {}
        check_known("config.mixers", mixers, options_by_key())
        selects = bool(values.get("select")) and not values.get("pattern")
        if selects and (changing := [name for name, phase in phases if phase.pattern]):
            raise ValueError(
                f"phase {changing[0]!r} has a pattern, and config.select chooses the one before it only when the run has begun, so "
                "that nobody knows which layers the phase would convert; name the layers in config.pattern"
            )
        if values.get("select"):
            check_known("config.select", values["select"], fields["select"])
        others = [name for name, phase in phases if phase.teacher]
        if others and values.get("model"):
            raise ValueError(
                f"phase {others[0]!r} has a teacher, but config.model is a new model, which gets a tokenizer of its own; a teacher "
                "needs the student's tokenizer: give a config.source"
            )
        if selects and values.get("model"):
            raise ValueError(
                "config.select ranks the layers of a trained source, but config.model is a new model; name its layers in "
                "config.pattern"
            )
        return cls(
            source=str(record.get("source") or ""),
            model=values.get("model") or {},
            pattern=values.get("pattern") or "",
            select=Selection.from_config(values["select"]) if selects else None,
            mixers=mixers,
            fresh_parameters=fresh,
            copy_attention=copies,
            phases=phases,
            data=data,
            seed=_seed(values["seed"], len(phases)),
            mesh=values.get("mesh") or {},
            record=json.loads(json.dumps(record, default=list)),
        )

    @classmethod
    def of_conversions(cls, record: Mapping[str, Any]) -> Experiment:
        """Returns what the record of a checked experiment says of conversions: the source, the mixers and how they begin, the seed.

        It has neither phases nor data, so that what these need (packages of hooks, texts) may be missing.
        """
        names = ("source", "mixers", "fresh_parameters", "copy_attention", "seed")
        return cls(**{name: record[name] for name in names if record.get(name) is not None})

    def mix_of(self, phase: Phase) -> dict[str, float]:
        """Returns the phase's own shares of the sources, or the experiment's."""
        return dict(phase.mix) or dict(self.data["mix"])

    @property
    def begin(self) -> dict[str, Any]:
        """How mixers begin, by the arguments of `initialize_hybrid`."""
        return dict(fresh_parameters=self.fresh_parameters, copy_attention=self.copy_attention)

    def mesh_of(self, phase: Phase | None = None) -> Mesh | None:
        """Returns the phase's own mesh, or the experiment's; None: one device."""
        sizes = (phase.mesh if phase is not None else None) or self.mesh
        return make_mesh(dict(sizes)) if sizes else None

    def meshes(self) -> list[Mesh | None]:
        """Returns the mesh of each phase in order; of an experiment without phases, its own."""
        return [self.mesh_of(phase) for _, phase in self.phases] or [self.mesh_of()]

    def with_mixer_options(self, config: ModelConfig) -> ModelConfig:
        """Returns a model's config with the experiment's `mixers`; what they leave out stays as the model has it.

        Raises:
          ValueError: an option asks for other parameters of a mixer than the model has; names one.
        """
        hf, classes = config_to_hf(config), options_by_key()
        own = {key: {name: x for name, x in hf.get(key, {}).items() if name in classes[key].checks()} for key in self.mixers}
        changed = config_from_hf({**hf, **{key: {**own[key], **values} for key, values in self.mixers.items()}})
        if config.is_hybrid and self.mixers:
            have, wanted = abstract_parameters(config), abstract_parameters(changed)
            if wrong := [name for name in sorted(have.keys() | wanted.keys()) if have.get(name) != wanted.get(name)]:
                has, wants = (tuple(x[wrong[0]].shape) if wrong[0] in x else "no such parameter" for x in (have, wanted))
                raise ValueError(
                    f"config.mixers ({', '.join(self.mixers)}) asks for other parameters than those of the source, which is "
                    f"already a hybrid: {wrong[0]} is {has} there, and would be {wants}; leave the option out, or convert the "
                    "Transformer again"
                )
        return changed

    def check_source(self) -> None:
        """Checks everything that the source's config, its tokenizer and the devices decide, before any work.

        That is the pattern, or how to select one; of every phase that its pattern can follow that of the phase before, that it
        finds the parameters it trains, that its rows fit the model and the mesh, and that the source, or the teacher that it
        names, can teach it; and the tokenizer.

        Raises:
          ValueError, FileNotFoundError: something does not fit; names the phase, or the file.
        """
        config = check_model_directory(self.source) if self.source else config_from_hf(dict(self.model))
        self._check_phases(self.with_mixer_options(config))
        if self.source:
            check_tokenizer_fits(load_tokenizer(self.source), config.vocab_size, self.source)

    def check_teacher(self, name: str, phase: Phase, source: ModelConfig) -> ModelConfig:
        """Checks that the teacher that a phase names can teach the source's hybrid, and returns its config.

        Args:
          name: the phase's.

        Raises:
          ValueError, FileNotFoundError: it cannot; names the phase.
        """
        try:
            teacher = check_model_directory(phase.teacher)
            check_same_ids(phase.teacher, self.source)
            with_student_ids(teacher, source)
            if phase.seq_len > teacher.max_position_embeddings:
                raise ValueError(
                    f"seq_len {phase.seq_len:,} is more than the teacher's max_position_embeddings, "
                    f"{teacher.max_position_embeddings:,}; lower it, or take another teacher"
                )
        except (ValueError, FileNotFoundError) as e:
            raise type(e)(f"phase {name!r}, teacher {phase.teacher}: {e}") from None
        return teacher

    def check_teacher_caches(self, done: Mapping[str, bool]) -> None:
        """Checks that the teacher cache of every phase that is not done holds the rows which the phase will see, and the answers of
        the teacher that it names.

        Raises:
          ValueError, FileNotFoundError: one does not.
        """
        for number, (name, phase) in enumerate(self.phases, start=1):
            if phase.teacher_cache and not done[name]:
                described = phase.described_rows(self.mix_of(phase), self.seed + number)
                cache = TeacherCache(phase.teacher_cache, made_of=cached_teacher(phase), **described)
                if cache.names_teacher and not phase.teacher:
                    raise ValueError(
                        f"phase {name!r} has no teacher, but {phase.teacher_cache} holds the answers of one that a phase named; "
                        "name it in phase.teacher, or make a cache of the source's answers with hybrid-jax cache-teacher"
                    )
                cache.check(phase.steps)

    def models(self, source: ModelConfig) -> dict[str, ModelConfig]:
        """Returns the config of the model with which each phase begins, in the phase's pattern and form, by the phase's name.

        Args:
          source: of the source, with the experiment's `mixers`; of a new model, its own.

        Raises:
          ValueError: the model of a phase cannot become that of the next one, has not the parameters that train, or not so many
            positions, or the source cannot teach it; names the phase.
        """
        pattern, positions = self.pattern, source.max_position_embeddings
        if self.select is not None:
            pattern = self.select.example(source)
        hybrid = source.with_pattern(pattern) if pattern else source
        check_convertible(source, hybrid)
        if not self.source:  # a new model has the pattern from the beginning, and is its own source
            source = hybrid
        form, found = hybrid, {}
        for name, phase in self.phases:
            positions = phase.max_position_embeddings or positions
            if phase.seq_len > positions:
                raise ValueError(
                    f"phase {name!r}: seq_len {phase.seq_len:,} is more than the model's max_position_embeddings, {positions:,}; "
                    "lower it, or set the phase's max_position_embeddings"
                )
            try:
                found[name] = form = _begun(form, phase, source)
                trained_names(form, phase.trainable)
            except ValueError as e:
                raise ValueError(f"phase {name!r}: {e}") from None
        return found

    def trained_before(self, name: str, models: Mapping[str, ModelConfig]) -> frozenset[str]:
        """Returns the names of the parameters that phases before one train, so that they are not the source's when it begins.

        Args:
          name: the phase's.
          models: see `models`.
        """
        found: set[str] = set()
        for earlier, phase in self.phases:
            if earlier == name:
                break
            found |= trained_names(models[earlier], phase.trainable)
        return frozenset(found & abstract_parameters(models[name].unfused()).keys())

    def _check_phases(self, source: ModelConfig) -> None:
        if self.select is not None:
            self.select.check(source, self.meshes()[0])
        models = self.models(source)
        for mesh, (name, phase) in zip(self.meshes(), self.phases, strict=False):
            if phase.teacher and models[name].is_fused:
                raise ValueError(
                    f"phase {name!r} has a teacher, but its model is still fused, with the source's layers as teachers; set its "
                    "form to 'unfused'"
                )
            teacher = self.check_teacher(name, phase, source) if phase.teacher else None
            try:
                if mesh is not None:
                    in_step = None if phase.teacher_cache else teacher
                    check_mesh_fits(models[name], mesh, phase.rows_at_a_time, phase.seq_len, in_step)
            except ValueError as e:
                raise ValueError(f"phase {name!r}: {e}") from None


def _begun(before: ModelConfig, phase: Phase, source: ModelConfig) -> ModelConfig:
    """Returns the config of the model with which a phase begins, in its pattern and its form.

    Args:
      before: of the model that the phase before left.
      source: of the teacher.

    Raises:
      ValueError: the model cannot become that, or the source cannot teach it.
    """
    model, fused = before, phase.keeps_teachers(before)
    if phase.pattern:
        have = before.unfused()
        try:
            model = have.with_pattern(phase.pattern)
            check_convertible(have, model)
        except ValueError as e:
            raise ValueError(f"the model is {have.pattern} before it and cannot become {phase.pattern}: {e}") from None
    if not fused:
        return model.unfused()
    if not model.is_fused:
        model = model.fused(source)
    if phase.pattern or phase.form == "fused":
        check_teacher(model, source)
    return model


def _seed(seed: Any, phases: int) -> int:
    """Returns the seed of an experiment.

    Raises:
      ValueError: it is out of range, or a phase would be trained on the synthetic rows that evaluations measure.
    """
    check_integer("config.seed", seed, minimum=0, maximum=2**31 - 1)
    if seed < HELD_OUT_SEED <= seed + phases:
        raise ValueError(
            f"config.seed is {seed}, which gives phase {HELD_OUT_SEED - seed} the seed of the rows of synthetic tasks that "
            "evaluations measure; choose another seed"
        )
    return seed


def _phases(values: Mapping[str, Any]) -> tuple[tuple[str, Phase], ...]:
    """Returns the scheduled phases in order.

    Raises:
      ValueError: one is missing, scheduled twice, or has a bad value.
    """
    schedule, phases = values["schedule"], values["phases"]
    missing = [name for name in schedule if name not in phases]
    if missing:
        raise ValueError(f"config.schedule names {missing[0]!r}, config.phases has {', '.join(phases) or 'none'}")
    twice = [name for n, name in enumerate(schedule) if name in schedule[:n]]
    if twice:
        raise ValueError(
            f"config.schedule names {twice[0]!r} twice, but checkpoints and metrics go by the phase's name; add a phase with the "
            "same values under another name to config.phases and schedule that one"
        )
    return tuple((name, Phase.from_config(name, phases[name])) for name in schedule)


def _check_data(data: Mapping[str, Any], fields: Mapping[str, Any], new_model: bool) -> None:
    """Checks the fields of a config's data."""
    check_known("config.data", data, fields)
    if new_model and not data.get("text"):
        raise ValueError("a new 'model' needs data.text, to train its tokenizer on")


def with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with absolute paths of its source, teachers and texts, where something is there; see `find_shipped`."""

    def absolute(path: Any) -> Any:
        if not isinstance(path, str) or path in ("", "stdlib") or path.startswith("hf:"):
            return path
        found = find_shipped(path)
        return str(found.absolute()) if found.exists() else path

    def within(values: Any, *keys: str) -> Any:
        return {**values, **{k: absolute(values[k]) for k in keys if k in values}} if isinstance(values, Mapping) else values

    found: dict[str, Any] = dict(within(config, "source"))
    if isinstance(phases := found.get("phases"), Mapping):
        found["phases"] = {name: within(phase, "teacher") for name, phase in phases.items()}
    if isinstance(data := found.get("data"), Mapping):
        found["data"] = data = dict(within(data, "text"))
        if isinstance(data.get("sources"), Mapping):
            data["sources"] = {name: within(source, "path") for name, source in data["sources"].items()}
    return found
