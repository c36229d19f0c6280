"""What reaches the loss: weights, shares, segments and the held-out part, against values computed by hand."""

import collections
import hashlib
import json

import numpy as np
import pytest

from hybrid_jax.data import Corpus, load_tokenizer, read_corpus, training_batches
from hybrid_jax.data.corpus import Source
from hybrid_jax.data.documents import is_held_out
from hybrid_jax.data.packing import PackedRows
from hybrid_jax.data.prepare import prepare
from hybrid_jax.data.tokens import Tokens

MODEL = "launch/tiny_qwen3"


def tokens_of(sizes, weights=None):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Tokens(np.arange(10, 10 + starts[-1]), starts, weights)


def test_first_fit_fills_the_first_open_row_that_has_room():
    rows = PackedRows(tokens_of([3, 5, 4, 2, 6, 2]), 8, "first_fit")
    found = [{name: values.tolist() for name, values in rows[i].items()} for i in range(len(rows))]
    assert found == [
        {
            "input_ids": [10, 11, 12, 13, 14, 15, 16, 17],
            "segment_ids": [1, 1, 1, 2, 2, 2, 2, 2],
            "loss_weights": [0, 1, 1, 0, 1, 1, 1, 1],
        },
        {
            "input_ids": [18, 19, 20, 21, 22, 23, 30, 31],
            "segment_ids": [1, 1, 1, 1, 2, 2, 3, 3],
            "loss_weights": [0, 1, 1, 1, 0, 1, 0, 1],
        },
        {
            "input_ids": [24, 25, 26, 27, 28, 29, 0, 0],
            "segment_ids": [1, 1, 1, 1, 1, 1, 0, 0],
            "loss_weights": [0, 1, 1, 1, 1, 1, 0, 0],
        },
    ]
    assert rows.filled == 22 / 24


@pytest.mark.parametrize("packing, want", [("first_fit", [0, 0, 1, 0, 1, 0, 0, 0]), ("split", [0, 0, 1, 0, 1, 0, 0, 1])])
def test_a_token_keeps_its_weight_and_the_first_of_a_segment_has_none(packing, want):
    weights = np.array([1, 0, 1, 1, 1, 0, 1, 1, 0, 1], np.uint8)
    rows = PackedRows(tokens_of([3, 3, 4], weights), 8, packing)
    assert rows[0]["loss_weights"].tolist() == want
    if packing == "first_fit":
        assert rows[1]["loss_weights"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def corpus_of(documents, **source):
    """A corpus of one source, whose documents are (its ids, its weights)."""
    ids, weights = (np.concatenate([d[part] for d in documents]) for part in (0, 1))
    starts = np.concatenate([[0], np.cumsum([len(d[0]) for d in documents])])
    tokens = [Tokens(ids, starts, weights.astype(np.uint8))]
    return Corpus(None, {"chat": Source("", **source)}, {"chat": tokens}, {"chat": tokens}, (1, 2), (3, 100))


LONG_AND_SHORT = [(np.full(12, 5), np.ones(12)), (np.full(4, 6), np.ones(4)), (np.full(3, 7), np.ones(3))]


@pytest.mark.parametrize(
    "source, rows",
    [
        ({}, [[5] * 8, [5] * 4 + [6] * 4, [7] * 3 + [0] * 5]),
        ({"long": "truncate"}, [[5] * 8, [6] * 4 + [7] * 3 + [0]]),
        ({"long": "drop"}, [[6] * 4 + [7] * 3 + [0]]),
        ({"packing": "split"}, [[5] * 8, [5] * 4 + [6] * 4]),
    ],
    ids=["conversations", "truncate", "drop", "split"],
)
def test_a_source_is_packed_as_it_says_and_conversations_whole(source, rows):
    corpus = corpus_of(LONG_AND_SHORT, **source)
    for found in (corpus.rows("chat", 8, 0), corpus.held_out_rows(8)):
        assert [found[i]["input_ids"].tolist() for i in range(len(found))] == rows


@pytest.mark.parametrize("task", ["retrieval", "induction"])
def test_an_answer_weighs_what_the_phase_says_and_text_weighs_one(task):
    corpus = corpus_of([(np.full(512, 5), np.ones(512))], packing="split")
    mix = {task: 0.5, "chat": 0.5}
    batch = next(training_batches(corpus, mix, batch_size=8, length=128, seed=0, answer_weight=0.25))
    text = (batch["input_ids"] == 5).all(axis=1)
    assert text.sum() == 4
    assert np.unique(batch["loss_weights"][text, 1:]).tolist() == [1.0]
    assert np.unique(batch["loss_weights"][~text]).tolist() == [0.0, 0.25]


class Numbered:
    """Rows of one token: where they come from."""

    unused = ""

    def __init__(self, first, number):
        self.first, self.number = first, number

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        return {"input_ids": np.asarray([self.first + int(i)])}


class ThreeSources:
    def rows(self, name, length, seed, answer_weight):
        return {"a": Numbered(0, 10), "b": Numbered(100, 7), "c": Numbered(200, 5)}[name]


def drawn(mix, steps, seed=3):
    stream = training_batches(ThreeSources(), mix, batch_size=5, length=1, seed=seed)
    return np.concatenate([next(stream)["input_ids"][:, 0] for _ in range(steps)])


def test_every_source_has_its_own_share_however_the_mix_is_written():
    for mix in ({"a": 0.7, "b": 0.2, "c": 0.1}, {"c": 1, "b": 2, "a": 7}):
        counts = collections.Counter((drawn(mix, 40) // 100).tolist())
        assert counts == {0: 140, 1: 40, 2: 20}
    assert set((drawn({"c": 0.5, "a": 0.5, "b": 0.0}, 10) // 100).tolist()) == {0, 2}


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    found = drawn({"a": 1.0}, 4)
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))
    assert found[:10].tolist() != found[10:].tolist() != list(range(10))
    assert drawn({"a": 1.0}, 2, seed=4).tolist() != found[:10].tolist()
    assert drawn({"a": 1.0}, 2).tolist() == found[:10].tolist()


def documents_of(rows):
    """A hash of the tokens of every segment."""
    found = set()
    for row in (rows[i] for i in range(len(rows))):
        for n in range(1, row["segment_ids"].max() + 1):
            found.add(hashlib.sha256(row["input_ids"][row["segment_ids"] == n].tobytes()).hexdigest())
    return found


def test_no_held_out_row_is_a_training_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the document number {i}"}) + "\n" for i in range(300)))
    corpus = read_corpus({"sources": {"web": {"path": str(path), "packing": "first_fit"}}}, MODEL, 0)
    train, held_out = documents_of(corpus.rows("web", 64, 0)), documents_of(corpus.held_out_rows(64))
    assert len(train) + len(held_out) == 300 and len(held_out) > 5
    assert not train & held_out


def test_which_documents_are_held_out_never_changes():
    """By the last four decimal digits of a name's SHA-256: the last two are the percent, those before them its hundredths."""
    digits = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000 for name in map(str, range(2000))}
    for percent in (5, 0.5, 33.33):
        want = {name for name, d in digits.items() if (d % 100) + (d // 100) / 100 < percent - 1e-9}
        assert {name for name in digits if is_held_out(name, percent)} == want
    assert [name for name in map(str, range(60)) if is_held_out(name)] == ["6", "26", "29"]


def test_a_prepared_source_of_many_small_files_loses_none_of_them_and_gives_the_rows_of_an_unprepared_one(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(8):
        lines = [json.dumps({"text": f"document {i} of the file {n}"}) + "\n" for i in range(6)]
        (folder / f"{n}.jsonl").write_text("".join(lines))
    prepare(str(folder), tmp_path / "out", MODEL, eos_token_id=0)
    found, want = (read_corpus({"text": str(path)}, MODEL, 0).rows("text", 128, 0) for path in (tmp_path / "out", folder))
    text = load_tokenizer(MODEL)
    names = [f"document {i} of the file {n}" for n in range(8) for i in range(6) if not is_held_out(f"{n}.jsonl:{i * 37}")]
    assert len(found) == len(want) == sum(len(text.encode(name).ids) + 1 for name in names) // 128 == 2
    for i in range(len(want)):
        assert all(np.array_equal(found[i][name], want[i][name]) for name in want[i])


def test_a_run_says_which_tokens_it_does_not_read(capsys):
    corpus = corpus_of(LONG_AND_SHORT, long="drop")
    training_batches(corpus, {"chat": 1.0}, batch_size=1, length=8, seed=0)
    assert capsys.readouterr().out.startswith("chat: 12 of 19 tokens are in no row: 1 documents are longer than a row of 8")
    with pytest.raises(ValueError, match="chat.* fills no row of 2 .*3 documents are longer"):
        corpus.rows("chat", 2, 0)


def test_a_rule_for_long_documents_of_a_text_is_refused_by_the_sources_name():
    tokens = [Tokens(np.arange(12), np.array([0, 12]))]
    corpus = Corpus(None, {"web": Source("", long="drop")}, {"web": tokens}, {"web": tokens}, (1, 2), (3, 100))
    with pytest.raises(ValueError, match=r"data.sources.web: long = 'drop' has no effect with packing = 'split'"):
        corpus.rows("web", 8, 0)


class TwoAlike:
    def rows(self, name, length, seed, answer_weight):
        return Numbered({"a": 0, "b": 100}[name], 10)


def test_sources_of_one_size_have_orders_of_their_own_whatever_order_the_mix_names_them_in():
    def steps(mix):
        stream = training_batches(TwoAlike(), mix, batch_size=5, length=1, seed=3)
        return np.concatenate([next(stream)["input_ids"][:, 0] for _ in range(4)])

    found = steps({"a": 0.5, "b": 0.5})
    assert found[found < 100].tolist() != (found[found >= 100] - 100).tolist()
    assert steps({"b": 0.5, "a": 0.5}).tolist() == found.tolist()


def test_one_shard_of_conversations_makes_a_source_of_conversations():
    plain, chat = Tokens(np.arange(12), np.array([0, 12])), Tokens(np.arange(6), np.array([0, 6]), np.ones(6, np.uint8))
    corpus = Corpus(None, {"x": Source("")}, {"x": [plain, chat]}, {"x": [plain]}, (1, 2), (3, 100))
    rows = corpus.rows("x", 8, 0)
    assert [rows[i]["segment_ids"].tolist() for i in range(len(rows))] == [[1] * 8, [1] * 4 + [0] * 4, [1] * 6 + [0] * 2]
