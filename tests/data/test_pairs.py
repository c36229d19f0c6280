"""Preference pairs: which records are read, what is learned of them, and how they fill rows."""

import json

import numpy as np
import pytest

from hybrid_jax.data import read_corpus, training_batches
from hybrid_jax.data.documents import document
from hybrid_jax.data.packing import PAIRS_IN_ROW, PackedRows
from hybrid_jax.data.prepare import prepare
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.data.tokens import Tokens
from hybrid_jax.selection.scorers.rows import OnRows

ASKED, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
TEMPLATE = (
    "{% for m in messages %}<|pairs|>{{ m.role }}\n{{ m.content }}<|ask|>{% endfor %}"
    "{% if add_generation_prompt %}<|pairs|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Tokenizer files with a chat template whose turns end with <|ask|>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["abc def " * 50], 270), folder, 256)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"messages": [ASKED], "chosen": "b", "rejected": "c"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "a", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
    ],
    ids=["texts", "messages", "answers in messages", "conversations"],
)
def test_a_pair_is_one_prompt_with_two_answers(record):
    found = document("x", {**record, "system": "Be brief."})
    system = {"role": "system", "content": "Be brief."}
    assert (list(found.messages), list(found.rejected)) == ([system, ASKED, GOOD], [system, ASKED, BAD])


@pytest.mark.parametrize(
    "record, words",
    [
        ({"chosen": "b", "rejected": "c"}, "'chosen' of a pair must be one answer of the assistant to a prompt"),
        ({"messages": [ASKED, GOOD], "chosen": "b", "rejected": "c"}, "'chosen' of a pair must be one answer"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [ASKED]}, "'rejected' of a pair must be one answer"),
        ({"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "x"}, BAD]}, "the same messages up to their last one"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the two answers of a pair are the same"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen' of a pair must be a text or messages, got 1"),
    ],
)
def test_a_record_that_is_no_pair_of_answers_to_one_prompt_is_refused(record, words):
    with pytest.raises(ValueError, match=words):
        document("x", record)


def tokens_of(*sizes):
    """Pairs of (chosen, rejected) lengths; ids count from 1, every token of a document but the first is learned."""
    starts = np.cumsum([0, *(n for pair in sizes for n in pair)])
    return Tokens(np.arange(1, starts[-1] + 1, dtype=np.uint16), starts, np.ones(starts[-1], np.uint8), pairs=True)


def test_a_pair_is_two_neighbouring_segments_of_one_row_and_too_long_ones_are_counted():
    tokens = tokens_of((2, 3), (9, 2), (1, 2), (4, 4))
    rows = PackedRows(tokens, 10, "pairs")
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 2, 2, 2, 3, 4, 4, 0, 0], [1] * 4 + [2] * 4 + [0, 0]]
    assert rows[0]["input_ids"].tolist() == [1, 2, 3, 4, 5, 17, 18, 19, 0, 0]
    assert rows[0]["loss_weights"].tolist() == [0, 1, 0, 1, 1, 0, 0, 1, 0, 0]
    assert (
        rows.unused == "11 of 27 tokens are in no row: 1 of 4 pairs are longer than a row of 10; raise seq_len to learn from them"
    )
    with pytest.raises(ValueError, match="'drop' has no effect on preference pairs"):
        PackedRows(tokens, 10, "pairs", "drop")


def test_a_row_has_a_bounded_number_of_pairs():
    rows = PackedRows(tokens_of(*[(1, 1)] * 200), 640, "pairs")
    assert [row["segment_ids"].max() // 2 for row in rows] == [PAIRS_IN_ROW] * 3 + [200 - 3 * PAIRS_IN_ROW]


def test_only_the_last_answers_of_both_conversations_are_learned_prepared_or_not(directory, tmp_path):
    talk = [ASKED, {"role": "assistant", "content": "abc"}, {"role": "user", "content": "def"}]
    path = written(tmp_path / "pairs.jsonl", [{"messages": talk, "chosen": "abc def", "rejected": "f"}] * 2)
    index = prepare(path, tmp_path / "out", str(directory), held_out_percent=0)
    assert index["train"]["documents"] == 2
    for source in (path, str(tmp_path / "out")):
        corpus = read_corpus({"sources": {"mine": {"path": source}}}, directory)
        batch = next(training_batches(corpus, {"mine": 1.0}, batch_size=1, length=120, seed=0, pairs=True))
        said = {n: batch["input_ids"][(batch["segment_ids"] == n) & (batch["loss_weights"] > 0)] for n in (1, 2)}
        texts = [corpus.tokenizer.decode(ids, skip_special_tokens=False) for ids in said.values()]
        assert texts == ["abc def<|ask|>", "f<|ask|>"]
        with pytest.raises(ValueError, match="mine has preference pairs, so its rejected answers would be learned"):
            training_batches(corpus, {"mine": 1.0}, batch_size=1, length=120, seed=0)
        with pytest.raises(ValueError, match="retrieval has no preference pairs"):
            training_batches(corpus, {"mine": 1.0, "retrieval": 1.0}, batch_size=1, length=120, seed=0, pairs=True)
        with pytest.raises(ValueError, match="every source has preference pairs"):
            corpus.held_out_rows(120)


def test_pairs_and_other_records_are_two_sources(directory, tmp_path):
    path = written(tmp_path / "both.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="put them in two sources"):
        prepare(path, tmp_path / "out", str(directory), held_out_percent=0)


def test_a_packing_cannot_be_chosen_for_pairs(directory, tmp_path):
    path = written(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 30)
    corpus = read_corpus({"sources": {"mine": {"path": path, "packing": "split"}}}, directory)
    with pytest.raises(ValueError, match="data.sources.mine has preference pairs, which are not packed by 'split'"):
        corpus.rows("mine", 64, 0)


def test_a_task_stands_in_text_and_not_in_pairs_of_which_the_rejected_answers_would_be_learned(directory, tmp_path):
    pairs = written(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "d" * 50, "rejected": "e" * 50}] * 40)
    (tmp_path / "text.txt").write_text("abc " * 4000)
    sources = {"first": {"path": pairs}, "web": {"path": str(tmp_path / "text.txt")}}
    corpus, alone, only = (
        read_corpus({"sources": {name: sources[name] for name in names}}, directory)
        for names in (("first", "web"), ("web",), ("first",))
    )
    assert corpus.identity({"needles": 1.0}) == alone.identity({"needles": 1.0})
    found, wanted = (
        [c.rows("needles", 120, 0)[0], c.task("needles", 120, 0, held_out=True)[0], OnRows(seq_len=120).text_rows(c)[0]]
        for c in (corpus, alone)
    )
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="every source has preference pairs"):
        only.rows("needles", 120, 0)[0]
    assert len(only.rows("retrieval", 120, 0)[0]["input_ids"]) == 120  # a task that stands in no text
