"""What a record, a folder or a config says beside its text: used, counted, or refused; never left out without a word."""

import json

import numpy as np
import pytest

from hybrid_jax.data import read_corpus
from hybrid_jax.data.corpus import read_sources
from hybrid_jax.data.documents import document, load_documents, pieces, split_documents, unread_files
from hybrid_jax.data.prepare import prepare

MODEL = "launch/tiny_qwen3"
ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"system": "Be brief.", "messages": [ASKED, SAID], "tools": "[]"},
        {"system": "Be brief.", "instruction": "a", "input": "", "output": "b"},
        {"messages": [SYSTEM, ASKED, SAID], "system": "", "tools": []},
    ],
    ids=["ShareGPT", "messages", "Alpaca", "its own"],
)
def test_the_system_message_beside_a_conversation_begins_it(record):
    assert list(document("x", record).messages) == [SYSTEM, ASKED, SAID]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [ASKED, SAID], "tools": [{"name": "f"}]}, "'tools' of a conversation are not rendered"),
        ({"messages": [SYSTEM, ASKED, SAID], "system": "x"}, "'system' must be text, and the only system message"),
        ({"messages": [ASKED, {**SAID, "weight": 0}]}, "an answer has weight = 0"),
        ({"conversations": [{"from": "gpt", "value": "b", "train": False}]}, "an answer has train = False"),
        ({"conversations": []}, "expected a 'text'"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "'input' must be text"),
    ],
)
def test_what_a_record_asks_for_and_does_not_get_is_refused(record, words):
    with pytest.raises(ValueError, match=words):
        document("x", record)


def test_weights_that_change_nothing_are_accepted():
    talk = [{**ASKED, "weight": 0}, {**SAID, "weight": 1, "train": True}]
    assert [m["content"] for m in document("x", {"messages": talk}).messages] == ["a", "b"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.txt", "B.TXT", "c.csv", "d.csv", "e.html", "LICENSE"):
        (folder / name).write_text(f"the text of {name}\n" * 5)
    (folder / "F.JSONL").write_text('{"text": "a record"}\n{"text": ""}\n')
    return folder


def test_endings_may_be_capitals_and_files_of_other_types_are_counted(folder, tmp_path, capsys):
    assert sorted(d.text[:15] for d in load_documents(str(folder))) == ["", "a record", "the text of B.T", "the text of a.t"]
    words = "4 files are not read (2 .csv, 1 .html, 1 without an ending)"
    read_corpus({"text": str(folder)}, MODEL, 0)
    assert capsys.readouterr().out.startswith(f"text: {words}")
    index = prepare(str(folder), tmp_path / "out", MODEL, eos_token_id=0)
    assert f"{folder}: {words}" in capsys.readouterr().out
    assert index["counts"] == {"empty": 1}
    assert unread_files(str(folder / "a.txt")) == unread_files("stdlib") == ""


def test_links_that_are_not_followed_are_counted(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "g.txt").symlink_to(folder / "a.txt")
    words = "6 files are not read (2 .csv, 1 .html, 2 links to folders or to nothing, 1 without an ending)"
    assert words in unread_files(str(folder))
    assert len(load_documents(str(folder))) == 5, "a link to a file is read"


@pytest.mark.parametrize("name", ["a.json", "a.CSV"])
def test_a_file_of_records_is_not_read_as_plain_text(tmp_path, name):
    (tmp_path / name).write_text(json.dumps([{"text": "x"}]))
    with pytest.raises(ValueError, match="would be read as plain text: make records of it"):
        pieces(str(tmp_path / name))


def test_an_empty_path_is_not_the_current_directory():
    with pytest.raises(ValueError, match="a source must be named"):
        pieces("")
    for path in ("", None, 3):
        with pytest.raises(ValueError, match="data.sources.web.path must name a source"):
            read_sources({"sources": {"web": {"path": path}}})


def test_a_source_does_not_take_the_place_of_the_text():
    with pytest.raises(ValueError, match="has 'text', and a source of that name"):
        read_sources({"text": "a.txt", "sources": {"text": {"path": "b.txt"}}})


def test_training_documents_that_are_held_out_elsewhere_are_counted(tmp_path, capsys):
    texts = [f"document {i}" for i in range(100)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *order]))
    parts = {name: split_documents(load_documents(str(tmp_path / f"{name}.jsonl"))) for name in "ab"}
    read_corpus({"sources": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"}}, MODEL, 0)
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    trained, held_out = ({name: {d.text for d in parts[name][i]} - {""} for name in "ab"} for i in (0, 1))
    for name, other in ("ab", "ba"):
        count = len(trained[name] & held_out[other])
        assert count > 2 and f"{name}: {count} training documents are held-out documents of {other} too, word for word" in said
    assert len(said) == 2


def test_the_held_out_rows_of_every_source_that_has_any_are_there_by_name(tmp_path, capsys):
    sizes = {"web": 200, "code": 220, "short": 1}
    for name, n in sizes.items():
        texts = [f"{name} number {i} of a text" for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = read_corpus({"sources": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in sizes}}, MODEL, 0)
    found = {name: corpus.held_out_rows(64, name) for name in ("web", "code")}
    for name, rows in found.items():
        texts = [d.text for d in split_documents(load_documents(str(tmp_path / f"{name}.jsonl")))[1]]
        tokens = sum(len(corpus.tokenizer.encode(text).ids) + 1 for text in texts)  # and the id that ends a document
        assert len(rows) == tokens // 64 and corpus.held_out_tokens()[name] == tokens
    assert not np.array_equal(found["web"][0]["input_ids"], found["code"][0]["input_ids"])
    assert np.array_equal(corpus.held_out_rows(64)[0]["input_ids"], found["web"][0]["input_ids"]), "by default the first source"
    counts = ", ".join(f"{tokens:,} tokens of {name}" for name, tokens in corpus.held_out_tokens().items())
    assert f"held out: {counts}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no source is named 'chat'; have web, code, short"):
        corpus.held_out_rows(64, "chat")
    with pytest.raises(ValueError, match="the held-out part of the source 'short' has"):
        corpus.held_out_rows(64, "short")
