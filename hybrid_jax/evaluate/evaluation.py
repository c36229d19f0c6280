"""An evaluation: models and runs, the instruments that measure them, the text and the mesh; and running it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hybrid_jax.checks import check_known
from hybrid_jax.config import ModelConfig
from hybrid_jax.config_file import load_config
from hybrid_jax.convert import check_model_directory, load_model
from hybrid_jax.data import Corpus, check_tokenizer_fits, load_tokenizer, read_corpus, read_tasks
from hybrid_jax.data.corpus import check_sources
from hybrid_jax.data.tasks import task_fields
from hybrid_jax.data.tokens import Encoder
from hybrid_jax.evaluate.instruments import INSTRUMENTS, Instrument, Subject, make_instrument
from hybrid_jax.evaluate.measured import Measured, Target
from hybrid_jax.evaluate.results import StoredResults, data_stamp, fingerprint
from hybrid_jax.files import find_shipped, read_json
from hybrid_jax.iterations import Iterations, as_text, read_iterations
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import barrier, is_first, say
from hybrid_jax.parallel.mesh import AXES, make_mesh
from hybrid_jax.parameters import with_iterations
from hybrid_jax.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How models are measured.

    Args:
      instruments: instruments by the names that the report gives them, in its order: that of `INSTRUMENTS`, then by name.
      data: `text`, `sources` and `tasks`, see `data.corpus`.
      mesh: mesh axis -> devices; empty: one device.
      models: what is measured before the models and runs of the command line.
    """

    instruments: Mapping[str, Instrument]
    data: Mapping[str, Any]
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    models: tuple[Target, ...] = ()

    @classmethod
    def from_config(cls, config: ConfigDict) -> Evaluation:
        """Returns the evaluation that a config describes.

        Args:
          config: `instruments` (name -> `instrument`, a name of `INSTRUMENTS`, and its options), `data`, and maybe `mesh` and
            `models` (name -> `path`, a directory, and maybe `gka_iterations`, see `iterations.read_iterations`).

        Raises:
          ValueError: an unknown field, instrument or option, a bad value, or a text that is not there.
        """
        values = config.to_dict()
        fields = evaluation_fields(values)
        check_known("the config", values, fields)
        data, instruments = values.get("data") or {}, values.get("instruments") or {}
        if not instruments:
            raise ValueError("the config needs 'instruments'; configs/evaluate.py is a complete example")
        check_known("config.data", data, fields["data"])
        check_sources(data)
        if bad := [name for name in instruments if not re.fullmatch(r"[\w. -]+", name)]:
            raise ValueError(f"config.instruments: names have letters, digits, '_', '-', '.' and spaces only, got {bad[0]!r}")
        read_tasks(data)
        made = {name: make_instrument(name, options) for name, options in instruments.items()}
        mesh = values.get("mesh") or {}
        check_known("config.mesh", mesh, AXES)
        order = sorted(instruments, key=lambda name: (list(INSTRUMENTS).index(instruments[name]["instrument"]), name))
        return cls({name: made[name] for name in order}, data, mesh, _models(values.get("models") or {}))

    def check(self, targets: Sequence[Target]) -> None:
        """Checks, before any text is read, that every target is a model whose tokenizer and iterations fit it.

        Raises:
          ValueError, FileNotFoundError: one is not.
        """
        for target in targets:
            check_tokenizer_fits(load_tokenizer(target.path), config_of(target).vocab_size, target.path)

    def run(self, targets: Sequence[Target], out: pathlib.Path | None = None) -> list[Measured]:
        """Measures the targets; every process of a job calls this and has the same results.

        A run's instruments must fit its last stage; earlier ones are measured beyond their positions, too, if a phase raised
        them.

        Args:
          out: results are stored here, and used again while nothing that they depend on has changed.

        Raises:
          ValueError: an instrument does not fit a model or the text; before anything is measured.
        """
        return _Run(self, targets, out).all()


class _Run:
    """One run of an evaluation: what is known of its targets, and the texts that it has read."""

    def __init__(self, evaluation: Evaluation, targets: Sequence[Target], out: pathlib.Path | None):
        self.evaluation, self.targets = evaluation, targets
        self.mesh = make_mesh(evaluation.mesh) if evaluation.mesh else None
        self.stored, self.corpora = StoredResults(out), {}
        barrier("read what is stored")
        self.configs = {t: config_of(t) for t in targets}
        self.encodings = {t: Encoder(t.path, config.extra.get("eos_token_id")).identity for t, config in self.configs.items()}
        data, instruments = data_stamp(evaluation.data), evaluation.instruments.items()
        own = {t: config.gka_iterations for t, config in self.configs.items()}
        self.prints = {t: {name: fingerprint(t.path, data, one, own[t]) for name, one in instruments} for t in targets}

    def all(self) -> list[Measured]:
        """Checks every target of which something is not stored, then measures all of them."""
        last = {target.run or target.name: target for target in self.targets}
        for target in self.targets:
            if any(self.stored.find(values) is None for values in self.prints[target].values()):
                self.corpus(target)
                if target in last.values():
                    self.check(target)
        return [self.measure(target) for target in self.targets]

    def corpus(self, target: Target) -> Corpus:
        """Returns the texts by the target's own tokenizer; models with equal tokenizers share them."""
        key = json.dumps(self.encodings[target], sort_keys=True)
        if key not in self.corpora:
            self.corpora[key] = read_corpus(self.evaluation.data, target.path, self.configs[target].extra.get("eos_token_id"))
        return self.corpora[key]

    def check(self, target: Target) -> None:
        """Checks that every instrument fits a target."""
        for name, instrument in self.evaluation.instruments.items():
            try:
                instrument.check(self.configs[target], self.corpus(target), self.mesh)
            except ValueError as e:
                raise ValueError(f"instruments.{name} does not fit {target.name!r} ({target.path}): {e}") from None

    def measure(self, target: Target) -> Measured:
        """Returns the results of a target: those that are stored, and the others, which are stored one by one."""
        path, prints, subject, results = str(target.path.absolute()), self.prints[target], None, {}
        path += f" with iterations {target.iterations}" if target.iterations else ""
        for name, instrument in self.evaluation.instruments.items():
            found = self.stored.find(prints[name])
            if found is None:
                if changes := self.stored.changes(path, name, prints[name]):
                    say(f"{target.name}, {name}: measured again, changed since the stored result: {', '.join(changes)}")
                if subject is None:
                    model, corpus = load_target(target, self.mesh), self.corpus(target)
                    subject = Subject(model, corpus.tokenizer, corpus, self.mesh)
                with _Bar(f"{target.name}, {name}") as progress:
                    found = instrument.measure(subject, progress)
                self.stored.store(path, name, prints[name], found)
            results[name] = found
        return Measured(target, self.configs[target].pattern, self.encodings[target]["tokenizer"][:12], results)


class _Bar:
    """A progress bar that an instrument moves in its own units."""

    def __init__(self, name: str):
        self.name, self.bar = name, None

    def __enter__(self) -> Callable[[int, int], object]:
        return self.show

    def show(self, done: int, total: int) -> None:
        """Moves the bar; it is drawn when the first part is done."""
        if self.bar is None:
            self.bar = progress_bar(name=self.name, unit="row", total=total, shown=is_first())
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _models(models: Mapping[str, Any]) -> tuple[Target, ...]:
    """Returns the models of a config, which keeps no order: those as their config.json says by name, then the others by their
    number of iterations, then those with iterations by layer.

    Raises:
      ValueError: one has no path, an unknown key, or iterations that are none.
    """
    found = []
    for name, values in models.items():
        where = f"config.models.{name}"
        if not isinstance(values, Mapping) or not values.get("path"):
            raise ValueError(f"{where} needs a path, the directory of a model, and may have gka_iterations; got {values!r}")
        check_known(where, values, ("path", "gka_iterations"))
        given = values.get("gka_iterations")
        iterations = "" if given in (None, "") else as_text(read_iterations(f"{where}.gka_iterations", given))
        found.append(Target(name, find_shipped(values["path"]), iterations=iterations))
    return tuple(sorted(found, key=lambda t: (t.iterations != "", ":" in t.iterations, len(t.iterations), t.iterations, t.name)))


def config_of(target: Target) -> ModelConfig:
    """Returns the config of a target, with its iterations, by the headers of its files.

    Raises:
      ValueError, FileNotFoundError: it is no model, or has no such layers for iterations.
    """
    config = check_model_directory(target.path)
    try:
        return config.with_iterations(target.given)
    except ValueError as e:
        raise ValueError(f"{target.name} ({target.path}): {e}") from None


def load_target(target: Target, mesh: Mesh | None = None) -> Decoder:
    """Loads a target in float32, with its iterations."""
    return with_iterations(load_model(target.path, dtype=jnp.float32, mesh=mesh), target.given)


def evaluation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every field that an evaluation's config may have, nested, each with a value of its type.

    Args:
      config: names the instruments, sources, tasks and models.
    """
    data = config.get("data") or {}
    instruments = {}
    for name, values in (config.get("instruments") or {}).items():
        kind = INSTRUMENTS.get(values.get("instrument", ""))
        options = {} if kind is None else {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
        instruments[name] = {"instrument": "", **options}
    sources = {name: {"path": "", "packing": "", "long": ""} for name in data.get("sources") or {}}
    return {
        "instruments": instruments,
        "data": {"text": "", "sources": sources, "tasks": task_fields(data.get("tasks") or {})},
        "mesh": dict.fromkeys(AXES, 1),
        "models": {name: {"path": "", "gka_iterations": ""} for name in config.get("models") or {}},
    }


def named(text: str) -> tuple[str, pathlib.Path]:
    """Splits NAME=DIR; directories that come with the package are found from everywhere.

    Raises:
      ValueError: it is not that.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError(f"expected NAME=DIR, got {text!r}")
    return name, find_shipped(path)


def targets_of(
    models: Sequence[str], runs: Sequence[str], iterations: Iterations | None = None, first: Sequence[Target] = ()
) -> list[Target]:
    """Returns the models, and every stage of the runs, each given as NAME=DIR, in order.

    Args:
      iterations: of Gated KalmaNet in all of them, which their names then say; None: as their config.json says.
      first: targets that stand before them.

    Raises:
      ValueError: there is nothing to measure, a name has no directory, or two have the same name.
      FileNotFoundError: a run has no stages.
    """
    given = [named(text) for text in models], [named(text) for text in runs]
    names = [name for name, _ in (*given[0], *given[1])]
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"the name {twice[0]!r} is given twice; give every --model and --run a name of its own")
    own, shown = ("", "") if iterations is None else (as_text(iterations), f" (iterations {as_text(iterations)})")
    found = [*first, *(Target(name + shown, path, iterations=own) for name, path in given[0])]
    for run, path in given[1]:
        stages = sorted((path / "stages").glob("[0-9]*_*"))
        if not stages:
            raise FileNotFoundError(f"{path} is not a run: it has no stages")
        source = read_json(path / "config.json").get("source") or ""
        found += [Target(f"{run} {s.name.partition('_')[2]}{shown}", s, run, i, source, own) for i, s in enumerate(stages)]
    names = [target.name for target in found]
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"two lines of the tables would be named {twice[0]!r}; give a --model or a --run another name")
    if not found:
        raise ValueError("give at least one --model NAME=DIR or --run NAME=DIR, or models in the config")
    return found


def read_evaluation(
    file: str,
    overrides: Sequence[str] = (),
    *,
    text: str | None = None,
    seq_len: int | None = None,
    rows: int | None = None,
) -> Evaluation:
    """Reads an evaluation's config.

    Args:
      file: see `load_config`.
      overrides: `--config.a.b=VALUE`.
      text: in place of the config's `data.text`.
      seq_len, rows: in place of those of every instrument that has them.

    Raises:
      ValueError: see `load_config` and `Evaluation.from_config`; or no instrument has `seq_len` or `rows`.
    """
    instruments = load_config([f"--config={file}"]).to_dict().get("instruments") or {}
    given = [] if text is None else [f"--config.data.text={text}"]
    for option, value in (("seq_len", seq_len), ("rows", rows)):
        kinds = {name: INSTRUMENTS.get(one.get("instrument")) for name, one in instruments.items() if value is not None}
        names = [n for n, kind in kinds.items() if kind is not None and option in {f.name for f in dataclasses.fields(kind)}]
        if value is not None and not names:
            raise ValueError(f"no instrument of {file} has the option {option}")
        given += [f"--config.instruments.{name}.{option}={value}" for name in names]
    return Evaluation.from_config(load_config([f"--config={file}", *given, *overrides], evaluation_fields))
