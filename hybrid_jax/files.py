"""Files and directories that appear complete or not at all: written under another name, then renamed. And the files that
come with the package."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

_PACKAGE = pathlib.Path(__file__).parent
SHIPPED = _PACKAGE / "shipped"  # in an installed package; in a checkout the same folders are beside the package
SHIPPED_FOLDERS = ("configs", "launch/tiny_qwen3")
# What belongs to a model in its directory: files and folders whose names are such.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "*.jinja", "*.model", "vocab.json", "vocab.txt",
    "merges.txt", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
MODEL_FOLDERS = ("additional_chat_templates",)


def shipped_root() -> pathlib.Path:
    """Returns the folder that holds `configs/` and `launch/tiny_qwen3/`: the checkout, or a folder of the installed package."""
    return SHIPPED if SHIPPED.is_dir() else _PACKAGE.parent


def find_shipped(path: str | pathlib.Path) -> pathlib.Path:
    """Returns `path`, or, if nothing is at that relative path, the file or folder of that name that comes with the package.

    `configs/prime_tiny.py`, `prime_tiny.py` and `launch/tiny_qwen3` are found from every working directory.
    """
    path = pathlib.Path(path)
    if path.is_absolute() or path.exists():
        return path
    root = shipped_root()
    there = root / "configs" / path if len(path.parts) == 1 else root / path
    ships = ".." not in path.parts and any(there.is_relative_to(root / folder) for folder in SHIPPED_FOLDERS)
    return there if ships and there.exists() else path


def check_new_directory(path: str | pathlib.Path, overwrite: bool = False, source: str | pathlib.Path = "") -> pathlib.Path:
    """Checks, before any work, that `path` can become a new directory, and returns it; leaves nothing behind.

    Args:
      overwrite: whether it may take the place of a model directory, one with a config.json and nothing else than a model's files.
      source: what it is made from, which must stay; empty: nothing.

    Raises:
      FileExistsError: something is there already, and it is no model directory or may not be replaced.
      FileNotFoundError: what was there is set aside (`check_not_set_aside`).
      PermissionError, NotADirectoryError: its parent cannot be written.
    """
    path = pathlib.Path(path)
    check_not_set_aside(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{path} exists already and is not empty; choose another output directory or remove it")
        _check_replaceable(path, source)
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link, which cannot become a directory; give the directory itself, or remove the link")
    if path.is_dir() and (path.is_mount() or path.samefile(".")):
        raise FileExistsError(
            f"{path} is the working directory or a mount point, where no directory can be renamed to; give a directory in it"
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {parent} is a file")
    check_writable(parent, path)
    return path


def _check_replaceable(path: pathlib.Path, source: str | pathlib.Path) -> None:
    """Checks that nothing but a model is lost when the directory `path` is replaced.

    Raises:
      FileExistsError: it is no model directory, it holds something else, or `source` is it or holds it.
    """
    if path.is_symlink() or not (path / "config.json").is_file():
        raise FileExistsError(
            f"{path} is not replaced: only a model directory, one with a config.json and no link, is; choose another output "
            "directory or remove it"
        )
    if source and path.resolve().is_relative_to(pathlib.Path(source).resolve()):
        raise FileExistsError(f"{path} is not replaced: it is, or is in, the source {source}; choose another output directory")
    other = [p.name for p in path.iterdir() if not _of_a_model(p)]
    if other:
        raise FileExistsError(
            f"{path} is not replaced: it also holds {min(other)}, which belongs to no model and would be lost; move it elsewhere, "
            "or choose another output directory"
        )


def _of_a_model(path: pathlib.Path) -> bool:
    """Returns whether something in a model's directory belongs to the model, by its name."""
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in (MODEL_FOLDERS if path.is_dir() else MODEL_FILES))


def model_files(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the files in a directory that belong to its model, by name; answers or reports written beside them do not."""
    return sorted(p for p in pathlib.Path(directory).iterdir() if p.is_file() and _of_a_model(p))


def check_writable(directory: pathlib.Path, path: pathlib.Path | None = None) -> None:
    """Checks that a directory can be written, by a temporary file.

    Args:
      path: what is to be written there, for the message; default: the directory.

    Raises:
      PermissionError: it cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as e:
        raise PermissionError(f"cannot write {path or directory}: {directory} is not writable ({e.strerror})") from None


def check_new_file(path: str | pathlib.Path) -> None:
    """Checks, before any work, that `path` can be written as a file.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: it cannot.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.absolute().parent}")
    check_writable(path.absolute().parent, path)


@contextlib.contextmanager
def new_directory(path: str | pathlib.Path, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary directory to fill. It becomes `path` when the block ends, and is removed if the block raises.

    Args:
      overwrite: whether it may take the place of a model directory, which is removed only then.
    """
    path = check_new_directory(path, overwrite)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        work.chmod(0o755)
        yield work
        if path.exists() and any(path.iterdir()) and overwrite:
            _replace(path, work)
            return
        if path.exists():
            path.rmdir()
        os.rename(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def check_not_set_aside(path: str | pathlib.Path) -> None:
    """Checks that nothing is missing at `path` because a program was killed between the two renames that replace a directory.

    Raises:
      FileNotFoundError: it is, or there is an empty directory in its place; says where the directory is that was to be replaced.
    """
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        return
    old = [p for p in path.absolute().parent.glob(f".{glob.escape(path.name)}.old.*") if p.is_dir()]
    if old:
        last = max(old, key=lambda p: p.stat().st_mtime)
        raise FileNotFoundError(
            f"{path} is missing, because a program was killed while it replaced it; the old directory is {last}: rename it to "
            f"{path.name} and run the command again, or remove it if you do not need it"
        )


def _replace(path: pathlib.Path, new: pathlib.Path) -> None:
    """Renames the directory `new` to `path`, and removes what was there only when that is done.

    A name of its own for what is set aside: whatever else has a similar name stays, also what a killed program left.
    """
    old = path.absolute().with_name(f".{path.name}.old.{uuid.uuid4().hex[:8]}")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def unused(path: pathlib.Path) -> pathlib.Path:
    """Returns the first of `path`, `path`.1, `path`.2, ... that does not exist."""
    names = (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000)))
    return next(p for p in names if not p.exists())


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file, replacing an older one in one step."""
    path = pathlib.Path(path)
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids of two machines may be equal
    work.write_text(text)
    work.rename(path)


def file_hash(path: str | pathlib.Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _hash_of(path: pathlib.Path, size: int, changed: int) -> str:
    """Returns the hash of a file; the size and the time of its last change are in the key of the cache."""
    return file_hash(path)


def model_hashes(model: pathlib.Path) -> dict[str, str]:
    """Returns a hash of every file of weights and of every JSON and Jinja file of a model (config, tokenizer, chat template; not of
    results that are written beside them), by name."""
    paths = (path for path in model_files(model) if path.suffix in (".json", ".jinja", ".safetensors"))
    return {path.name: _hash_of(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


LARGEST_JSON = 1 << 28  # bytes; tokenizers of large vocabularies have tens of millions


def _not_a_number(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not JSON")
    return float(text)  # Infinity: older checkpoints have it in limits


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object, e.g. a checkpoint's `config.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not valid JSON, too large, too deeply nested, contains NaN, or holds something other than an object; names
        the file.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a JSON file of a model has at most {LARGEST_JSON:,}")
    try:
        value = json.loads(path.read_bytes().decode(), parse_constant=_not_a_number)
    except RecursionError:
        raise ValueError(f"{path} is not usable JSON (too deeply nested)") from None
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, {{...}}, it holds {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """Names the JSON type of a value that is not an object."""
    return {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
