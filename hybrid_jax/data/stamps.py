"""Stamps of the pieces of a source when it was read, so that tokens are not used again after the source changed."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_jax.data.documents import Piece, dataset_fingerprint

SHOWN = 3  # changes that a message names


def _files(piece: Piece) -> list[str]:
    """Returns the paths of the files that a piece reads."""
    if piece.reader == "files":
        return [os.path.join(piece.arguments[0], name) for name in piece.arguments[1]]
    return [] if piece.reader == "hf" else [piece.arguments[0]]


def stamp(piece: Piece, source: str) -> dict[str, Any]:
    """Describes a piece in JSON's types: equal for the same files, whatever the path by which the source was named.

    Args:
      piece: a part of the source.
      source: the path or name of the source.

    Returns:
      `reader`; `range`, the part of its file or data set; `files`, path within the source -> [bytes, time of the last change
      in nanoseconds].
    """
    root = piece.arguments[0] if piece.reader == "files" else source if os.path.isdir(source) else os.path.dirname(source)
    stats = {os.path.relpath(path, root or "."): os.stat(path) for path in _files(piece)}
    part = list(piece.arguments[1:]) if piece.reader != "files" else []
    if piece.reader == "hf":
        part = [*piece.arguments, dataset_fingerprint(*piece.arguments[:2])]
    files = {pathlib.Path(name).as_posix(): [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"reader": piece.reader, "range": part, "files": files}


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describes the differences between the stamps of a source's pieces; the list is empty if they are equal."""
    old, new = ({name: stat for piece in pieces for name, stat in piece["files"].items()} for pieces in (before, now))
    found = [f"{name} is gone" for name in old if name not in new]
    found += [f"{name} is new" for name in new if name not in old]
    for name in new:
        if name in old and old[name] != new[name]:
            sizes = f"{old[name][0]:,} -> {new[name][0]:,} bytes" if old[name][0] != new[name][0] else "at the same size"
            found.append(f"{name} changed ({sizes})")
    if not found and list(before) != list(now):
        found = ["the source is divided into other pieces"]
    return found[:SHOWN] + ([f"and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else [])
