"""Documents, plain text or conversations: the Python standard library, files of many formats, Hugging Face datasets.

A source is divided into pieces that can be read independently: the unit of work when a source is tokenized in parallel.
Whether a document is training data or held out depends on its name alone.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from hybrid_jax.data.pairs import is_pair, pair_of
from hybrid_jax.data.text import check_text, decode

HELD_OUT_PERCENT = 5
PIECE_BYTES = 64 * 2**20
PIECE_ROWS = 50_000  # of a Hugging Face dataset
TEXT_FILES = (".py", ".txt", ".md", ".rst")
RECORD_FILES = (".jsonl", ".parquet", ".arrow")
TABLES = (".json", ".csv", ".tsv")  # they hold records too, but are not read
_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo"}
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
FORMATS = (
    "expected a 'text', 'messages' or 'conversations' (of role and content), 'instruction' and 'output', "
    "'prompt' and 'completion' (or 'response'), or, of a preference pair, 'prompt' or 'messages', 'chosen' and 'rejected'"
)
SOURCES = "'stdlib', a text file, .jsonl, .parquet or .arrow, a folder of such, or hf:NAME[:SPLIT]"


class Document(NamedTuple):
    """A text, a conversation or a preference pair.

    Args:
      name: identifies the document in its source.
      text: the text; empty for a conversation.
      messages: {role, content} each, of a conversation; of a pair, of the one that ends with the chosen answer.
      rejected: of a pair, the conversation that ends with the rejected answer.
      replaced: how many characters stand for bytes that were not UTF-8.
    """

    name: str
    text: str = ""
    messages: tuple[dict, ...] = ()
    rejected: tuple[dict, ...] = ()
    replaced: int = 0


class Piece(NamedTuple):
    """A part of a source; equal for equal files.

    Args:
      reader: a name in `READERS`.
      arguments: what that reader takes.
    """

    reader: str
    arguments: tuple


def document(name: str, record: Any) -> Document:
    """Makes a document of a record in any of the known formats, see `FORMATS`.

    Raises:
      ValueError: the record has none of the formats.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{FORMATS}; got {type(record).__name__}")
    if is_pair(record):
        chosen, rejected = (_conversation(record, side) for side in pair_of(record, _message))
        return Document(name, messages=chosen, rejected=rejected)
    if turns := record.get("messages") or record.get("conversations"):
        return Document(name, messages=_conversation(record, tuple(_message(turn) for turn in turns)))
    if isinstance(record.get("text"), str):
        return Document(name, check_text(record["text"]))
    for asked, answers in (("instruction", ("output", "response")), ("prompt", ("completion", "response"))):
        answer = next((record[a] for a in answers if isinstance(record.get(a), str)), None)
        if isinstance(record.get(asked), str) and answer is not None:
            more = record.get("input") or ""
            if not isinstance(more, str):
                raise ValueError(f"'input' must be text, got {more!r:.80}")
            said = (("user", "\n\n".join(filter(None, (record[asked], more)))), ("assistant", answer))
            talk = tuple({"role": role, "content": check_text(text)} for role, text in said)
            return Document(name, messages=_conversation(record, talk))
    raise ValueError(f"{FORMATS}; got {', '.join(record) or 'nothing'}")


def _conversation(record: dict, messages: tuple[dict, ...]) -> tuple[dict, ...]:
    """Returns the messages, preceded by the record's `system` message if it has one.

    Raises:
      ValueError: it describes tools, which are not rendered, or its system message is not text or comes twice.
    """
    if tools := [name for name in ("tools", "functions") if record.get(name) not in (None, "", "[]", [], {})]:
        raise ValueError(f"{tools[0]!r} of a conversation are not rendered: describe them in its system message, or remove the key")
    if not (system := record.get("system")):
        return messages
    if not isinstance(system, str) or messages[0]["role"] == "system":
        raise ValueError(f"'system' must be text, and the only system message; got {system!r:.80}")
    return ({"role": "system", "content": check_text(system)}, *messages)


def _message(turn: Any) -> dict[str, Any]:
    """Makes a message {role, content, ...} of a turn in OpenAI's or ShareGPT's format."""
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(role, role) if isinstance(role, str) else None
        for name in ("weight", "train"):
            if turn.get(name) in (0, False) and role == "assistant":
                raise ValueError(f"an answer has {name} = {turn[name]!r}: which answers are learned cannot be chosen; all are")
        if role is not None and isinstance(content, str):
            more = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
            return {"role": role, "content": check_text(content), **more}
    raise ValueError(f"a message needs a role and a content, both text; got {turn!r:.80}")


# Readers ------------------------------------------------------------------------------------------------------------

Records = Iterator[tuple[str, Any, int]]
"""A record's name, the record or the ValueError that reading it gave, and how many characters replace bytes that are not UTF-8."""


def _read_files(root: str, names: tuple[str, ...], replace: bool = False) -> Records:
    for name in names:
        try:
            text, replaced = decode(pathlib.Path(root, name).read_bytes(), replace)
            yield name, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}, replaced
        except ValueError as e:
            yield name, e, 0


def _read_jsonl(path: str, begin: int, end: int, replace: bool = False) -> Records:
    """Reads the lines that begin in bytes [begin, end)."""
    with open(path, "rb") as file:
        if begin:
            file.seek(begin - 1)
            file.readline()
        while (offset := file.tell()) < end and (line := file.readline()):
            if not line.strip():
                continue
            record: Any = None
            replaced = 0
            try:
                text, replaced = decode(line, replace)
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"not JSON ({e})") from None
            except ValueError as e:
                record = e
            yield f"{pathlib.Path(path).name}:{offset}", record, replaced


def _rows(table: Any, name: str) -> Records:
    """Reads the rows of a pyarrow table; one by one if some are not UTF-8."""
    try:
        records = table.to_pylist()
    except UnicodeDecodeError as e:
        if table.num_rows > 1:
            parts = (_rows(table.slice(i, 1), name) for i in range(table.num_rows))
            records = [record for part in parts for _, record, _ in part]
        else:
            records = [ValueError(f"not UTF-8 (byte 0x{e.object[e.start]:02x} at offset {e.start})")]
    yield from ((f"{name}:{i}", record, 0) for i, record in enumerate(records))


def _read_parquet(path: str, group: int, replace: bool = False) -> Records:
    table = _import("pyarrow.parquet", "pyarrow").ParquetFile(path).read_row_group(group)
    yield from _rows(table, f"{pathlib.Path(path).name}:{group}")


def _read_arrow(path: str, replace: bool = False) -> Records:
    """Reads an Arrow file, or the Arrow stream that Hugging Face's `datasets` saves."""
    pyarrow = _import("pyarrow", "pyarrow")
    with pyarrow.memory_map(path) as file:
        try:
            table = pyarrow.ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            table = pyarrow.ipc.open_stream(file).read_all()
        yield from _rows(table, pathlib.Path(path).name)


@functools.lru_cache(1)
def _hugging_face(name: str, split: str) -> Any:
    return _import("datasets", "datasets").load_dataset(name, split=split)


def dataset_fingerprint(name: str, split: str) -> str:
    """Returns the fingerprint by which `datasets` identifies the content of a Hugging Face dataset."""
    return str(getattr(_hugging_face(name, split), "_fingerprint", ""))


def _read_hugging_face(name: str, split: str, begin: int, end: int, replace: bool = False) -> Records:
    rows = _hugging_face(name, split)
    for i in range(begin, end):
        yield f"{name}:{split}:{i}", rows[i], 0


READERS: dict[str, Callable[..., Records]] = {
    "files": _read_files,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "hf": _read_hugging_face,
}


def _import(module: str, package: str) -> Any:
    """Imports an optional dependency.

    Raises:
      ValueError: it is not installed; the message names the package.
    """
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise ValueError(f"reading this source needs {package}: pip install {package}") from None


# Sources ------------------------------------------------------------------------------------------------------------


def _modules(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the Python files below a folder, relative to it, without those of the folders in `_SKIP`."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIP]
        yield from (pathlib.Path(folder, name).relative_to(root) for name in files if name.endswith(".py"))


def pieces(source: str) -> list[Piece]:
    """Divides a source into pieces, in order.

    Args:
      source: `stdlib` (the sources of the running Python's standard library); a text file; a `.jsonl`, `.parquet` or
        `.arrow` file of records (see `document`); a folder of such files; `hf:NAME[:SPLIT]` (needs `datasets`).

    Raises:
      ValueError: the source does not exist, is empty, or a package that it needs is not installed.
    """
    if not source:
        raise ValueError(f"a source must be named: give {SOURCES}")
    if source == "stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        return _file_pieces(root, sorted(_modules(root)))
    if source.startswith("hf:"):
        _, name, *split = source.split(":")
        split = split[0] if split else "train"
        n = len(_hugging_face(name, split))
        return [Piece("hf", (name, split, i, min(i + PIECE_ROWS, n))) for i in range(0, n, PIECE_ROWS)]
    path = pathlib.Path(source)
    if path.is_file() and path.suffix.lower() in TABLES:
        raise ValueError(f"{source!r} would be read as plain text: make records of it, one JSON object per line of a .jsonl file")
    found: list[Piece] = []
    texts: list[pathlib.Path] = []
    for file in _files(path):
        kind = file.suffix.lower()
        if kind == ".jsonl":
            size = file.stat().st_size
            found += [Piece("jsonl", (str(file), i, min(i + PIECE_BYTES, size))) for i in range(0, size, PIECE_BYTES)]
        elif kind == ".parquet":
            groups = _import("pyarrow.parquet", "pyarrow").ParquetFile(file).num_row_groups
            found += [Piece("parquet", (str(file), i)) for i in range(groups)]
        elif kind == ".arrow":
            found.append(Piece("arrow", (str(file),)))
        elif kind in TEXT_FILES or file == path:
            texts.append(file)
    root = path.parent if path.is_file() else path
    found += _file_pieces(root, [f.relative_to(root) for f in texts])
    if not found:
        empty = f"the folder {source!r} has no text files" if path.is_dir() else f"the file {source!r} is empty"
        raise ValueError(f"{empty if path.exists() else f'no text at {source!r}'}: give {SOURCES}")
    return found


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the file, or all files in a folder and its subfolders."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []


def unread_files(source: str) -> str:
    """Describes which files of a folder are not read because of their types; empty if all are read."""
    if source == "stdlib" or source.startswith("hf:") or not pathlib.Path(source).is_dir():
        return ""
    kinds = collections.Counter(p.suffix.lower() or "without an ending" for p in _files(pathlib.Path(source)))
    kinds["links to folders or to nothing"] = sum(p.is_symlink() and not p.is_file() for p in pathlib.Path(source).rglob("*"))
    other = [(kind, n) for kind, n in sorted(kinds.items()) if n and kind not in (*TEXT_FILES, *RECORD_FILES)]
    if not other:
        return ""
    named = ", ".join(f"{n:,} {kind}" for kind, n in other[:8])
    return f"{sum(n for _, n in other):,} files are not read ({named}); read are {', '.join((*TEXT_FILES, *RECORD_FILES))}"


def _file_pieces(root: pathlib.Path, names: list[pathlib.Path]) -> list[Piece]:
    """Groups text files into pieces of about `PIECE_BYTES`."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += (root / name).stat().st_size
        if size > PIECE_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(str(name))
    return [Piece("files", (str(root), tuple(group))) for group in groups if group]


def read_piece(piece: Piece, on_bad: Callable[[str], None] | None = None, replace: bool = False) -> Iterator[Document]:
    """Reads the documents of a piece.

    Args:
      piece: a part of a source, see `pieces`.
      on_bad: called with the description of each record that cannot be read; default: the first such record raises.
      replace: put U+FFFD in place of bytes that are not UTF-8, and count it in `Document.replaced`.

    Raises:
      ValueError: a record cannot be read; the message says where it is.
    """
    for name, record, replaced in READERS[piece.reader](*piece.arguments, replace=replace):
        try:
            if isinstance(record, ValueError):
                raise record
            yield document(name, record)._replace(replaced=replaced)
        except ValueError as e:
            where = _location(piece, name)
            if on_bad is None:
                raise ValueError(f"{where}: {e}") from None
            on_bad(f"{where}: {e}")


def _location(piece: Piece, name: str) -> str:
    """Describes where a record is, for a message: its file, with the line number if it is a line."""
    if piece.reader == "files":
        return str(pathlib.Path(piece.arguments[0], name))
    if piece.reader != "jsonl":
        return name
    path, offset = piece.arguments[0], int(name.rpartition(":")[2])
    with open(path, "rb") as file:
        line = 1
        while offset > 0:
            part = file.read(min(offset, 2**20))
            line += part.count(b"\n")
            offset -= len(part)
    return f"{path}, line {line}"


def load_documents(source: str) -> list[Document]:
    """Reads all documents of a source (see `pieces`)."""
    return [d for piece in pieces(source) for d in read_piece(piece)]


def content(document: Document) -> bytes:
    """Returns a hash of a document's text or messages, whatever its name is."""
    content = json.dumps([document.text, document.messages, document.rejected], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).digest()


def is_held_out(name: str, percent: float = HELD_OUT_PERCENT) -> bool:
    """Returns whether a document belongs to the held-out part, by a hash of its name: the same on every machine."""
    h = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return h % 100 * 100 + h // 100 % 100 < 100 * percent


def split_documents(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Divides documents into (training, held-out) by their names.

    If that leaves one of the parts empty, texts are divided by their length instead: the last 5 percent of the characters are
    held out, and the document in which they begin gives its first part to training. Documents are never joined.
    """
    documents = list(documents)
    train = [d for d in documents if not is_held_out(d.name)]
    held_out = [d for d in documents if is_held_out(d.name)]
    if (train and held_out) or any(d.messages for d in documents):
        return train, held_out
    left = sum(len(d.text) for d in documents) * (100 - HELD_OUT_PERCENT) // 100
    train, held_out = [], []
    for d in documents:
        if d.text[:left]:
            train.append(d._replace(text=d.text[:left]))
        if d.text[left:]:
            held_out.append(d._replace(text=d.text[left:]))
        left = max(left - len(d.text), 0)
    return train, held_out
