"""What was measured of models, as objects and as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_jax.evaluate.measurement import Measurement, half_width
from hybrid_jax.files import write_text
from hybrid_jax.iterations import Iterations, read_iterations

SEVERAL = "one per seed"  # in place of the pattern of repetitions that chose different ones


@dataclasses.dataclass(frozen=True)
class Target:
    """A model to measure.

    Args:
      name: of its row in the tables.
      path: its directory.
      run, stage, source: for a stage of a run, the run's name, the stage's number from 0 and the directory of the run's source.
      iterations: of Gated KalmaNet, in place of those of its config.json, as `iterations.read_iterations` reads them; empty: none.
    """

    name: str
    path: pathlib.Path
    run: str = ""
    stage: int = 0
    source: str = ""
    iterations: str = ""

    @property
    def given(self) -> Iterations | None:
        """The iterations as `hybrid_jax.with_iterations` takes them."""
        return read_iterations("gka_iterations", self.iterations) if self.iterations else None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Args:
      pattern: the model's pattern.
      tokenizer: identifies the tokenizer; losses per token are comparable only between equal ones.
      results: instrument -> its measurements.
    """

    target: Target
    pattern: str
    tokenizer: str
    results: Mapping[str, Sequence[Measurement]]

    def named(self, name: str) -> Measured:
        """Returns the same under another name."""
        return dataclasses.replace(self, target=dataclasses.replace(self.target, name=name))


def measurement_from(values: Mapping[str, Any]) -> Measurement:
    """Returns a measurement from what `dataclasses.asdict` and JSON made of it."""
    numbers = {name: float(values[name]) for name in ("value", "low", "high")}
    return Measurement(**{**values, **numbers, "sums": tuple((float(a), float(b)) for a, b in values["sums"])})


def _in_json(value: Any) -> Any:
    """Returns a value with the numbers that JSON does not have as text: `inf`, `-inf`, `nan`; `float` reads them."""
    if isinstance(value, Mapping):
        return {key: _in_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_measured(rows: Sequence[Measured], path: pathlib.Path) -> None:
    """Writes everything that was measured as JSON, which `read_measured` reads."""
    write_text(path, json.dumps(_in_json([dataclasses.asdict(row) for row in rows]), default=str, allow_nan=False) + "\n")


def read_measured(path: pathlib.Path) -> list[Measured]:
    """Reads what `write_measured` wrote."""
    found = []
    for row in json.loads(path.read_text()):
        target = Target(**{**row["target"], "path": pathlib.Path(row["target"]["path"])})
        results = {name: [measurement_from(m) for m in measurements] for name, measurements in row["results"].items()}
        found.append(Measured(target, row["pattern"], row["tokenizer"], results))
    return found


def over_repeats(name: str, repeats: Sequence[Measured]) -> Measured:
    """Returns the means over repetitions of a run that differ only in their seed, with Student's 95 % intervals over them.

    Args:
      name: of the result.
      repeats: at least two. Measurements that not all of them have are left out.
    """
    results, patterns = {}, {row.pattern for row in repeats}
    for instrument, measurements in repeats[0].results.items():
        others = [{m.key: m for m in row.results.get(instrument, ())} for row in repeats]
        results[instrument] = [_mean([o[m.key] for o in others]) for m in measurements if all(m.key in o for o in others)]
    pattern = repeats[0].pattern if len(patterns) == 1 else SEVERAL
    return Measured(dataclasses.replace(repeats[0].target, name=name), pattern, repeats[0].tokenizer, results)


def _mean(same: Sequence[Measurement]) -> Measurement:
    """Returns the mean of one measurement over repetitions; the interval of a share ends at 0 and at 1."""
    values = np.array([m.value for m in same])
    half = half_width(float(values.std(ddof=1) / np.sqrt(len(values))), len(values))
    mean, (least, most) = float(values.mean()), (0.0, 1.0) if same[0].unit == "share" else (-np.inf, np.inf)
    low, high = max(mean - half, least), min(mean + half, most)
    return dataclasses.replace(same[0], value=mean, low=low, high=high, count=len(values), sums=())
