"""Sources of every format, conversations through chat templates, and tokenizing ahead of time."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from hybrid_jax.commands.main import main
from hybrid_jax.data import documents as documents_module
from hybrid_jax.data import read_corpus
from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.documents import Document, is_held_out, load_documents, pieces, read_piece
from hybrid_jax.data.prepare import prepare
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.data.tokens import Encoder, load_prepared

SOURCE = "launch/tiny_qwen3"
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
# The turns of Qwen, Llama 3 and Mistral, in their templates' own shapes.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
THINKING = (  # Qwen3's: the last answer gets a block that earlier ones lose
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory's tokenizer, with a template."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["What is 2 + 2? It is 4. def f(x): return x"] * 3, 300)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, directory, 256)
    with_template(directory, CHATML)
    return directory


def with_template(directory, template):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
        {"instruction": "What is 2 + 2?", "input": "", "output": "It is 4."},
        {"prompt": "What is 2 + 2?", "completion": "It is 4."},
        {"prompt": "What is 2 + 2?", "response": "It is 4."},
    ],
    ids=lambda r: "+".join(r),
)
def test_conversations_of_every_known_form_are_the_same_document(record):
    assert documents_module.document("x", record).messages == tuple(CHAT)


def test_the_same_records_come_from_jsonl_parquet_arrow_and_hugging_face_datasets(tmp_path, monkeypatch):
    pyarrow, parquet, datasets = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet", "datasets"))
    records = [{"text": f"document {i}\nsecond line"} for i in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    table = pyarrow.Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"own/set": datasets.Dataset.from_list(records)}[name])
    want = [r["text"] for r in records]
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "saved", "hf:own/set:train"):
        assert [d.text for d in load_documents(str(source))] == want, source
    assert len(pieces(str(tmp_path / "a.parquet"))) == 3


def test_a_jsonl_file_is_cut_anywhere_and_every_line_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * (i % 13)}) + "\n" for i in range(50)))
    want = load_documents(str(path))
    assert len(want) == 50
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(documents_module, "PIECE_BYTES", size)
        assert [d for p in pieces(str(path)) for d in read_piece(p)] == want


def test_a_record_that_can_not_be_read_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"txt": 1}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected a 'text'.*got txt"):
        load_documents(str(path))
    path.write_text('{"text": "good"}\n\nnot json\n')
    with pytest.raises(ValueError, match="a.jsonl, line 3: not JSON"):
        load_documents(str(path))
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match="line 1: a message needs a role and a content"):
        load_documents(str(path))


def test_the_held_out_part_can_be_any_share():
    names = [str(i) for i in range(20_000)]
    assert sum(is_held_out(n, 0.5) for n in names) == pytest.approx(100, abs=30)
    assert not any(is_held_out(n, 0) for n in names)


# Conversations ------------------------------------------------------------------------------------------------------


def said(directory, messages):
    """The pieces of text that are learnt."""
    text, spans = ChatTemplate(directory).answers(messages)[:2]
    return [text[a:b] for a, b in spans]


TWO_TURNS = [*CHAT, {"role": "user", "content": "And 4?"}, {"role": "assistant", "content": "Also 4."}]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "generation marks"])
def test_only_what_the_assistant_says_is_learnt_its_end_included(model, tmp_path, template):
    directory = with_template(model, template)
    assert said(directory, TWO_TURNS) == ["It is 4.<|im_end|>", "Also 4.<|im_end|>"]


def test_a_template_that_adds_thoughts_to_the_last_answer_only(model):
    assert said(with_template(model, THINKING), TWO_TURNS) == ["It is 4.<|im_end|>", "<think>\n\n</think>\n\nAlso 4.<|im_end|>"]


def test_learnt_tokens_decode_to_what_the_assistant_said(model):
    encode = Encoder(with_template(model, CHATML))
    tokens = encode([Document("a", messages=tuple(TWO_TURNS)), Document("b", "It is 4.")])
    (begin, middle, end) = tokens.starts
    learnt = tokens.ids[begin:middle][tokens.weights[begin:middle] == 1]
    assert encode.tokenizer.decode(learnt, skip_special_tokens=False) == "It is 4.<|im_end|>Also 4.<|im_end|>"
    assert tokens.weights[middle:end].all() and tokens.ids[end - 1] == encode.end_id


def test_conversations_without_a_template_or_refused_by_it_are_said(model, tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate(tmp_path)
    with pytest.raises(ValueError, match="x: the chat template refuses this conversation: the user begins"):
        Encoder(with_template(model, STRICT))([Document("x", messages=tuple(CHAT[1:]))])


def test_a_template_can_not_reach_the_machine(model):
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate(with_template(model, "{{ messages.__class__.__mro__ }}")).render(CHAT)


# Ahead of time ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A JSONL file of several pieces."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} of the text"}) + "\n" for i in range(400)))
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 4000)
    return path


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_prepared_tokens_are_those_made_on_the_fly(model, lines, tmp_path):
    index = prepare(str(lines), tmp_path / "out", str(model), workers=2)
    corpus = read_corpus({"text": str(lines)}, model)
    for part, found in zip(("train", "held_out"), load_prepared(tmp_path / "out", corpus.tokenizer), strict=True):
        (want,) = getattr(corpus, part)["text"]
        assert len(found) > 1 or part == "held_out"
        assert np.array_equal(np.concatenate([t.ids for t in found]), want.ids)
        assert np.array_equal(np.concatenate([np.diff(t.starts) for t in found]), np.diff(want.starts))
        assert index[part]["tokens"] == len(want.ids) and index[part]["text_bytes"] == want.text_bytes
    again = read_corpus({"sources": {"web": {"path": str(tmp_path / "out")}}}, model)
    assert len(again.rows("web", 32, 0)) > 0


def test_a_killed_preparation_goes_on_and_ends_as_if_nothing_had_happened(model, lines, tmp_path):
    want, out = tmp_path / "want", tmp_path / "out"
    prepare(str(lines), want, str(model))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, program, str(lines), str(out), str(model)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list(out.glob("shard-*"))) < 2 or not list(out.glob(".shard-*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.wait()
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert not (out / "index.json").exists() and len(done) == 2 < len(list(want.glob("shard-*")))
    prepare(str(lines), out, str(model))
    assert contents(out) == contents(want)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*") if p.name in done} == done
    before = contents(out)
    prepare(str(lines), out, str(model))
    assert contents(out) == before


# Its workers, who read this too, hang while they write the third shard.
PROGRAM = """
import pathlib, sys, time
from hybrid_jax.data import documents, prepare

documents.PIECE_BYTES = 4000
write = prepare.write_text

def write_text(path, text):
    if len(list(pathlib.Path(sys.argv[2]).glob("shard-*"))) == 2:
        time.sleep(1000)
    write(path, text)

prepare.write_text = write_text
if __name__ == "__main__":
    prepare.prepare(*sys.argv[1:])
"""


def test_other_settings_and_other_tokenizers_are_refused(model, lines, tmp_path):
    prepare(str(lines), tmp_path / "out", str(model))
    with pytest.raises(ValueError, match="holds another preparation"):
        prepare(str(lines), tmp_path / "out", str(model), held_out_percent=1)
    with pytest.raises(ValueError, match="which is not the model's"):
        read_corpus({"text": str(tmp_path / "out")}, SOURCE)


def test_the_command_counts_what_it_was_told_to_skip(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"txt": 1}\n' * 30)
    command = ["prepare", str(path), str(tmp_path / "out"), "--tokenizer", SOURCE]
    assert main(command) == 1
    assert "line 2: expected a 'text'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*shard*")), "nothing half-written"
    (tmp_path / "out" / "plan.json").unlink()
    assert main([*command, "--skip-bad"]) == 0
    assert "30 records could not be read, the first: " + f"{path}, line 2" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["train"]["documents"] + index["held_out"]["documents"] == 30
