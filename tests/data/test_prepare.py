"""A prepared directory is of the text as it is now: what changed is named, what failed can be corrected, what is bad is counted."""

import json
import os

import numpy as np
import pytest

from hybrid_jax.commands.main import main
from hybrid_jax.data import documents as documents_module
from hybrid_jax.data import read_corpus
from hybrid_jax.data import tokens as tokens_module
from hybrid_jax.data.documents import load_documents
from hybrid_jax.data.prepare import prepare
from hybrid_jax.data.tokens import Encoder, load_prepared

MODEL = "launch/tiny_qwen3"


@pytest.fixture
def folder(tmp_path):
    """Four text files, a piece each."""
    path = tmp_path / "folder"
    path.mkdir()
    for name in "abcd":
        (path / f"{name}.txt").write_text(f"text {name}\n" * 20)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 100)


def total(index):
    return sum(index[part]["tokens"] for part in ("train", "held_out"))


def change_text(folder):
    (folder / "b.txt").write_text("longer than it was\n" * 50)


def change_time(folder):
    stat = (folder / "b.txt").stat()
    os.utime(folder / "b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change, words",
    [
        (change_text, r"b\.txt changed \(140 -> 950 bytes\)"),
        (change_time, r"b\.txt changed \(at the same size\)"),
        (lambda folder: (folder / "e.txt").write_text("x"), r"e\.txt is new"),
        (lambda folder: (folder / "c.txt").unlink(), r"c\.txt is gone"),
    ],
    ids=["text", "time", "new", "gone"],
)
def test_tokens_are_not_used_again_after_their_text_changed(folder, tmp_path, change, words):
    prepare(str(folder), tmp_path / "out", MODEL)
    change(folder)
    with pytest.raises(ValueError, match=f"holds another preparation: {words}"):
        prepare(str(folder), tmp_path / "out", MODEL)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(held_out_percent=50), "held_out_percent was 5, now 50"),
        (dict(eos_token_id=7), r"document_end was \[0\], now \[7\]"),
    ],
)
def test_another_setting_is_named(folder, tmp_path, options, words):
    prepare(str(folder), tmp_path / "out", MODEL)
    with pytest.raises(ValueError, match=words):
        prepare(str(folder), tmp_path / "out", MODEL, **options)


def test_the_same_source_is_known_from_another_directory(folder, tmp_path, monkeypatch):
    index = prepare(str(folder), tmp_path / "out", MODEL)
    model = os.path.abspath(MODEL)
    monkeypatch.chdir(tmp_path)
    assert prepare("folder", "out", model) == index
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir("deep")
    assert prepare("../folder", "../out", os.path.relpath(model)) == index
    record = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert os.path.isabs(record["source"]) and os.path.isabs(record["tokenizer_from"])


LINES = [json.dumps({"text": f"good {i}"}) for i in range(30)]


def test_a_failed_preparation_does_not_block_the_corrected_one(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join([*LINES, '{"txt": 1}', *LINES]))
    with pytest.raises(ValueError, match="line 31"):
        prepare(str(path), out, MODEL)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert len(before) > 2
    index = prepare(str(path), out, MODEL, skip_bad=True)
    assert index["bad"] == 1 and index["train"]["documents"] + index["held_out"]["documents"] == 60
    assert {n: (out / n).stat().st_mtime_ns for n in before} == before, "what was finished is kept"
    with pytest.raises(ValueError, match=r"skip_bad was on \(1 records\), now off"):
        prepare(str(path), out, MODEL)


@pytest.mark.parametrize(
    "lines, words",
    [(['{"txt": 1}', "["], r"none of its 2 records could be read, the first: .*a\.jsonl, line 1"), ([""], "nothing in it")],
)
def test_a_source_of_which_no_document_is_left_is_refused(tmp_path, capsys, lines, words):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join(lines) + "\n")
    for _ in range(2):  # the second time the shards are there
        with pytest.raises(ValueError, match=rf"a\.jsonl has no documents: .*{words}"):
            prepare(str(path), out, MODEL, skip_bad=True)
    assert not (out / "index.json").exists()
    assert main(["prepare", str(path), str(out), "--tokenizer", MODEL, "--skip-bad"]) == 1
    assert "has no documents" in capsys.readouterr().err


def test_what_an_unfinished_preparation_has_of_changed_files_is_made_again(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join([*LINES, '{"txt": 1}']))
    with pytest.raises(ValueError, match="line 31"):
        prepare(str(path), out, MODEL)
    path.write_text("\n".join([*reversed(LINES), '{"text": "now it is good"}']))
    prepare(str(path), out, MODEL)
    assert "finished shards are made again: a.jsonl changed (" in capsys.readouterr().out
    want, parts = Encoder(MODEL, 0)(load_documents(str(path))), load_prepared(out, Encoder(MODEL).tokenizer)
    assert sorted(i for part in parts for t in part for i in t.ids.tolist()) == sorted(want.ids.tolist())
    assert sum(len(t.starts) - 1 for part in parts for t in part) == 31


def test_other_settings_start_over_only_where_nothing_was_finished(folder, tmp_path):
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a.txt"):
        prepare(str(folder), tmp_path / "out", MODEL)
    (folder / "a.txt").write_bytes(b"text")
    index = prepare(str(folder), tmp_path / "out", MODEL, held_out_percent=50)
    assert index["held_out_percent"] == 50
    (folder / "d.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="d.txt"):
        prepare(str(folder), tmp_path / "two", MODEL)
    with pytest.raises(ValueError, match="holds another preparation: held_out_percent was 5, now 50"):
        prepare(str(folder), tmp_path / "two", MODEL, held_out_percent=50)


def test_tokens_with_another_beginning_of_documents_are_refused(folder, tmp_path, monkeypatch):
    prepare(str(folder), tmp_path / "out", MODEL)
    monkeypatch.setattr(tokens_module, "added_around", lambda tokenizer: ([1], []))
    with pytest.raises(ValueError, match=r"was prepared with document_begin = \[\], this model has \[1\]"):
        read_corpus({"text": str(tmp_path / "out")}, MODEL)


def test_a_file_that_changes_while_it_is_read_is_not_taken(folder, tmp_path, monkeypatch):
    encode = tokens_module.Encoder.__call__

    def meanwhile(self, documents):
        change_text(folder)
        return encode(self, documents)

    monkeypatch.setattr(tokens_module.Encoder, "__call__", meanwhile)
    with pytest.raises(ValueError, match="changed while it was being prepared: b.txt"):
        prepare(str(folder), tmp_path / "out", MODEL)
    assert not (tmp_path / "out" / "index.json").exists()


# Bytes that are not text --------------------------------------------------------------------------------------------

LATIN = "naïve café\n".encode("latin-1")


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.txt", LATIN, r"a\.txt: not UTF-8 \(byte 0xef at offset 2\): convert it to UTF-8, or"),
        ("a.bin", b"GIF89a\0\1\2", r"a\.bin: not text: it has null bytes \(at offset 6\)"),
        ("a.txt", "text".encode("utf-16"), "not text"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 1: not UTF-8 \(byte 0xe9 at offset 13\)"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: the text has half of a surrogate pair \(U\+D800\)"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "half of a surrogate pair"),
    ],
    ids=["latin-1", "binary", "UTF-16", "latin-1 lines", "surrogates", "surrogates in a conversation"],
)
def test_what_is_not_utf8_is_refused_by_name_and_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        load_documents(str(tmp_path / name))


def test_what_is_replaced_or_skipped_is_counted(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(LATIN)
    (folder / "b.txt").write_bytes("\ufffd stays\n".encode() + b"\xff")
    (folder / "c.txt").write_bytes(b"good")
    (folder / "d.txt").write_bytes(b"\0")
    command = ["prepare", str(folder), str(tmp_path / "out"), "--tokenizer", MODEL, "--held-out=0"]
    assert main(command) == 1
    assert f"{folder}/a.txt: not UTF-8" in capsys.readouterr().err
    assert main([*command, "--replace-invalid"]) == 1
    assert "d.txt: not text" in capsys.readouterr().err, "what is binary is never replaced"
    assert main([*command, "--replace-invalid", "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert "1 records could not be read, the first: " in out
    assert "2 documents had bytes that are not UTF-8" in out and "3 characters of them were replaced" in out
    (ids,) = [np.concatenate([t.ids for t in part]) for part in load_prepared(tmp_path / "out", Encoder(MODEL).tokenizer)[:1]]
    text = Encoder(MODEL).tokenizer.decode(ids.tolist())
    assert text == "na\ufffdve caf\ufffd\n\ufffd stays\n\ufffdgood"
    assert main(command) == 1
    assert "skip_bad was on (1 records), now off; replace_invalid was on (2 records), now off" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text_and_line_ends_are_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert [d.text for d in load_documents(str(tmp_path))] == ["x", "one\ntwo\nthree\n"]


def test_table_rows_that_are_not_utf8_are_named_and_the_others_read(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    column = pyarrow.array([b"good", b"caf\xe9", b"too"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    bad = []
    (piece,) = documents_module.pieces(str(tmp_path / "a.parquet"))
    assert [d.text for d in documents_module.read_piece(piece, bad.append)] == ["good", "too"]
    assert len(bad) == 1 and bad[0].startswith("a.parquet:0:1: not UTF-8 (byte 0xe9 at offset 3)")
