"""Documents: the Python standard library's sources, or the user's own files."""

from __future__ import annotations

import hashlib
import json
import pathlib
import sysconfig
from typing import NamedTuple

HELD_OUT_PERCENT = 5
_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo"}


class Document(NamedTuple):
    name: str
    text: str


def _standard_library() -> list[Document]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIP.isdisjoint(relative.parts):
            try:
                found.append(Document(str(relative), path.read_text("utf-8")))
            except UnicodeDecodeError:
                continue  # a handful of files exist to test other encodings
    return found


def _jsonl(path: pathlib.Path) -> list[Document]:
    rows = []
    for i, line in enumerate(path.read_text("utf-8").splitlines()):
        try:
            rows.append(Document(f"{path}:{i}", json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {i + 1}: expected a JSON object with a 'text' key ({e})") from None
    return rows


def load_documents(source: str) -> list[Document]:
    """Reads text documents.

    Args:
      source: `stdlib` (the sources of the running Python's standard library), a `.jsonl` file of objects
        with a `text` key, a text file, or a folder of text files (.py, .txt, .md, .rst).

    Raises:
      ValueError: nothing is there, or a file is not what it should be.
    """
    if source == "stdlib":
        return _standard_library()
    path = pathlib.Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return _jsonl(path)
    if path.is_file():
        return [Document(str(path), path.read_text("utf-8"))]
    files = sorted(p for p in path.rglob("*") if p.suffix in (".py", ".txt", ".md", ".rst")) if path.is_dir() else []
    if not files:
        raise ValueError(f"no text at {source!r}: give 'stdlib', a .jsonl file, a text file or a folder of text files")
    return [Document(str(p.relative_to(path)), p.read_text("utf-8", errors="replace")) for p in files]


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the held-out part: by a hash of its name, the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; a single document gives its first and last parts instead."""
    train = [d for d in documents if not is_held_out(d.name)]
    held_out = [d for d in documents if is_held_out(d.name)]
    if train and held_out:
        return train, held_out
    everything = "\n".join(d.text for d in documents)
    cut = len(everything) * (100 - HELD_OUT_PERCENT) // 100
    return [Document("first part", everything[:cut])], [Document("last part", everything[cut:])]
