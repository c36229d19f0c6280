"""The points of a sweep: every config with every combination of overrides; and the directory that belongs to them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from hybrid_jax.checks import check_known
from hybrid_jax.config_file import flat
from hybrid_jax.files import new_directory, write_text

KEYS = {"configs", "grid", "points", "evaluate"}
MODELS = "models"  # of `evaluate`: models that are measured beside the points, name -> directory
ITERATIONS = "gka_iterations"  # of `evaluate`: with which the points, not the models beside them, are measured
EVALUATE_KEYS = {"config", "text", "seq_len", "rows", MODELS, ITERATIONS}
LONGEST_NAME = 100  # characters; file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
      name: of its directory and of its row; says what distinguishes it from the sweep's other points.
      config: a config file, with its argument after a colon.
      overrides: (field of the config, value), e.g. `("phases.align.steps", 60)`.
    """

    name: str
    config: str
    overrides: tuple[tuple[str, Any], ...]

    @property
    def arguments(self) -> list[str]:
        """The point as options of the command line."""
        return [f"--config={self.config}", *(f"--config.{k}={v}" for k, v in self.overrides)]

    def without(self, field: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """Returns config and overrides without one field: equal for points that differ only in it."""
        return self.config, tuple(pair for pair in self.overrides if pair[0] != field)


def points_of(config: Mapping[str, Any]) -> list[Point]:
    """Returns every config with every combination of `grid` (its fields, each with a tuple of values) and every one of `points`
    (its fields, each with a value); both nested like the config.

    Raises:
      ValueError: an unknown key, nothing to run, or the same point twice.
    """
    check_known("the sweep", config, KEYS)
    check_known("sweep.evaluate", config.get("evaluate") or {}, EVALUATE_KEYS)
    grid = flat(config.get("grid") or {})
    single = next((k for k, v in grid.items() if not isinstance(v, (tuple, list))), None)
    if single:
        raise ValueError(
            f"sweep.grid.{single} must be a tuple of values, got {grid[single]!r}; for one value write ({grid[single]!r},)"
        )
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    listed = [flat(p) for p in config.get("points") or [{}]]
    files = config.get("configs") or ()
    if isinstance(files, str):
        raise ValueError(f"sweep.configs must be a tuple of files, got {files!r}; for one file write ({files!r},)")
    found = [(str(file), {**one, **other}) for file in files for one in combined for other in listed]
    if not found:
        raise ValueError("the sweep has no configs, or an empty grid")
    twice = next((pair for i, pair in enumerate(found) if pair in found[:i]), None)
    if twice:
        raise ValueError(f"the sweep has the same point twice: {twice[0]} with {twice[1]}")
    names = names_of(found)
    return [Point(name, file, tuple(fields.items())) for name, (file, fields) in zip(names, found, strict=True)]


def names_of(points: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A name for each (config, overrides): the config where there are several, and the fields whose values differ.

    A field is called by the shortest end of its path that no other such field has. A long name ends in a hash instead.
    """
    missing = object()
    fields = dict.fromkeys(k for _, overrides in points for k in overrides)
    varying = [k for k in fields if len({repr(o.get(k, missing)) for _, o in points}) > 1]
    ends = {k: ["_".join(k.split(".")[-n:]) for n in range(1, k.count(".") + 2)] for k in varying}
    short = {k: next((e for e in ends[k] if sum(e in other for other in ends.values()) == 1), ends[k][-1]) for k in varying}
    several = len({file for file, _ in points}) > 1 or not varying
    names = []
    for file, overrides in points:
        stem = re.sub(r"\.py\b", "", pathlib.PurePath(file).name)
        parts = [stem] * several + [f"{short[k]}={overrides[k]}" for k in varying if k in overrides]
        names.append(re.sub(r"[^\w.=+-]+", "_", ",".join(parts)).strip("_") or "default")
    return [
        name if len(name) <= LONGEST_NAME and names.count(name) == 1 else f"{name[: LONGEST_NAME - 9]}-{_hash(point)}"
        for name, point in zip(names, points, strict=True)
    ]


def _hash(point: Any) -> str:
    return hashlib.sha256(repr(point).encode()).hexdigest()[:8]


def claim(
    out: pathlib.Path,
    points: Sequence[Point],
    configs: Sequence[ConfigDict],
    evaluate: Mapping[str, Any],
    instruments: ConfigDict | None = None,
) -> None:
    """Makes the directory this sweep's; tasks of an array may do so at the same time.

    Args:
      configs: each point's config with its overrides. The results of a directory are of one version of them; meshes may change.
      evaluate: how the points are evaluated.
      instruments: the config that `evaluate` names, of which the results are of one version too; None: points are not evaluated.

    Raises:
      ValueError: it is another's; names a difference.
    """
    described = [{**dataclasses.asdict(p), "fields": _described(c)} for p, c in zip(points, configs, strict=True)]
    evaluated = {**evaluate, **({} if instruments is None else _described(ConfigDict({"config": instruments})))}
    text = json.dumps({"evaluate": evaluated, "points": described}, indent=1, default=list)
    record = out / "sweep.json"
    if not record.exists():
        try:
            with new_directory(out) as directory:
                write_text(directory / "sweep.json", text + "\n")
        except OSError:
            if not record.exists():  # else another task of the array was first
                raise
    difference = _difference(json.loads(record.read_text()), json.loads(text))
    if difference:
        raise ValueError(f"{out} holds another sweep: {difference} (compare {record}); choose another --out, or remove it")


def _described(config: ConfigDict) -> dict[str, Any]:
    """The fields of a point's config, without meshes, which change nothing that is compared."""
    return {name: value for name, value in flat(config.to_dict()).items() if "mesh" not in name.split(".")}


def _difference(old: Any, new: Mapping[str, Any]) -> str:
    """One difference between two sweeps in words; empty if there is none."""
    if not isinstance(old, dict) or [p["name"] for p in old["points"]] != [p["name"] for p in new["points"]]:
        return "its points are not these"
    groups = [("sweep.evaluate", old["evaluate"], new["evaluate"])]
    for was, now in zip(old["points"], new["points"], strict=True):
        if was["config"] != now["config"]:
            return f"{now['name']} is of {now['config']} now and was of {was['config']}"
        groups.append((f"{now['name']}: config", was["fields"], now["fields"]))
    for where, was, now in groups:
        for name in sorted({*was, *now}, key=lambda name: (name.count("."), name)):
            if (name in was) != (name in now) or was[name] != now[name]:
                return f"{where}.{name} is {now.get(name, 'absent')!r} now and was {was.get(name, 'absent')!r}"
    return ""
