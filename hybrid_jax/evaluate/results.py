"""Stored results of instruments: one file per model and instrument, used again while nothing that it depends on has changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_jax.data.corpus import read_sources, source_stamp
from hybrid_jax.evaluate.instruments import Instrument, name_of
from hybrid_jax.evaluate.measured import measurement_from
from hybrid_jax.evaluate.measurement import Measurement
from hybrid_jax.files import model_hashes, write_text
from hybrid_jax.parallel.distributed import is_first, say

FORMAT = 2  # raised when an instrument measures something else than before


def data_stamp(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an evaluation's `data` is, by name: the tasks; the order of the texts, because tasks stand in the first one; and
    of each text how it fills rows and a stamp of its files."""
    sources = read_sources(data).items()
    texts = {f"the text {name}": [source.packing, source.long, source_stamp(source.path)] for name, source in sources}
    return texts | {"the order of the texts": list(texts), "tasks": dict(data.get("tasks") or {})}


def fingerprint(
    model: pathlib.Path, data: Mapping[str, Any], instrument: Instrument, iterations: Sequence[int | None] = ()
) -> dict[str, Any]:
    """Returns everything that a result depends on, by name, in JSON's types.

    That is `model_hashes`, the data, and the instrument with its options and what else it depends on. Names, paths and meshes are
    not in it.

    Args:
      model: a model directory.
      data: see `data_stamp`.
      iterations: the model's `ModelConfig.gka_iterations`, which no file holds.
    """
    found: dict[str, Any] = {"format": FORMAT, **data, **model_hashes(model)}
    found["instrument"] = name_of(instrument)
    found["the instrument's files or machine"] = instrument.stamp()
    found |= {"iterations of Gated KalmaNet": iterations} if iterations else {}
    found |= {f"the option {name}": value for name, value in dataclasses.asdict(instrument).items()}
    return json.loads(json.dumps(found, default=list))


def key_of(values: Mapping[str, Any]) -> str:
    """Returns a hash of a fingerprint, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class StoredResults:
    """The results in `DIRECTORY/stored`, or nothing without a directory."""

    def __init__(self, directory: pathlib.Path | None):
        self.directory = None if directory is None else directory / "stored"
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(self.directory.glob("*.json")) if self.directory is not None and self.directory.is_dir() else ():
            try:
                record = json.loads(path.read_text())
                self.records[key_of({**record["fingerprint"]})] = record
            except (ValueError, KeyError, TypeError) as e:
                say(f"{path} is not a complete stored result ({type(e).__name__}: {e}); what it was of is measured again")

    def find(self, values: Mapping[str, Any]) -> list[Measurement] | None:
        """Returns the measurements that were stored with this fingerprint, or None."""
        record = self.records.get(key_of(values))
        return None if record is None else [measurement_from(m) for m in record["measurements"]]

    def changes(self, model: str, instrument: str, values: Mapping[str, Any]) -> list[str]:
        """Returns by what a stored result of the same model and instrument differs; empty if there is none.

        Args:
          model: the directory, as text.
          instrument: its name in the evaluation.
        """
        for record in self.records.values():
            if (record["path"], record["name"]) == (model, instrument):
                old = record["fingerprint"]
                return [name for name in {**old, **values} if old.get(name) != values.get(name)]
        return []

    def store(self, model: str, instrument: str, values: Mapping[str, Any], measurements: list[Measurement]) -> None:
        """Keeps the measurements of a model and an instrument; the first process writes them. See `changes` for the arguments."""
        found = [dataclasses.asdict(m) for m in measurements]
        record = {"path": model, "name": instrument, "fingerprint": dict(values), "measurements": found}
        self.records[key_of(values)] = record
        if self.directory is None or not is_first():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', f'{pathlib.PurePath(model).name}.{instrument}')}.{key_of(values)[:16]}.json"
        write_text(self.directory / name, json.dumps(record) + "\n")
