"""Text, packing, synthetic tasks and their mix."""

import json

import numpy as np
import pytest

from hybrid_jax.data import training_batches
from hybrid_jax.data.documents import Document, is_held_out, load_documents, split_documents
from hybrid_jax.data.packing import PackedRows
from hybrid_jax.data.tasks import Induction, KeyValueRetrieval, Material
from hybrid_jax.data.tokenizer import ASK, END_OF_TEXT, PAIRS, train_tokenizer
from hybrid_jax.data.tokens import Tokens
from tests.conftest import TEXT


def test_the_standard_library_is_real_text_and_splits_without_overlap():
    documents = load_documents("stdlib")
    assert sum(len(d.text) for d in documents) > 5_000_000
    train, held_out = split_documents(documents)
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert 0.01 < len(held_out) / len(documents) < 0.12
    assert all(is_held_out(d.name) for d in held_out)


def test_text_sources_are_read_or_refused_clearly(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    assert load_documents(str(tmp_path / "a.jsonl"))[0].text == "hello"
    (tmp_path / "b.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        load_documents(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="no text at"):
        load_documents(str(tmp_path / "nothing"))


def test_a_single_document_is_split_into_its_first_and_last_part():
    train, held_out = split_documents([Document("one", "x" * 1000)])
    assert len(train[0].text) == 950 and len(held_out[0].text) == 50


def test_few_documents_are_divided_by_length_and_stay_documents():
    documents = [Document(name, name * 100) for name in "abc"]
    assert not any(is_held_out(d.name) for d in documents)
    train, held_out = split_documents(documents)
    assert [d.text for d in train] == ["a" * 100, "b" * 100, "c" * 85] and [d.text for d in held_out] == ["c" * 15]


def test_the_tokenizer_is_reversible_and_has_its_markers_first():
    tokenizer = train_tokenizer([TEXT], 300)
    assert [tokenizer.token_to_id(t) for t in (END_OF_TEXT, PAIRS, ASK)] == [0, 1, 2]
    odd = "naïve\t→ 'ünïcode'\n\r x"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_packed_rows_cover_the_stream_and_never_predict_across_documents():
    tokens = Tokens(np.arange(20), np.array([0, 7, 9, 20]))
    rows = PackedRows(tokens, 8)
    assert len(rows) == 2
    first, second = rows[0], rows[1]
    assert np.array_equal(np.concatenate([first["input_ids"], second["input_ids"]]), np.arange(16))
    assert first["segment_ids"].tolist() == [1] * 7 + [2]
    assert first["loss_weights"].tolist() == [0] + [1] * 6 + [0]
    assert second["segment_ids"].tolist() == [1] + [2] * 7
    assert len(PackedRows(tokens, 21)) == 0


def test_retrieval_rows_ask_every_key_once_and_weigh_the_values():
    task = KeyValueRetrieval(Material((3, 200), 1, 2), 64, min_pairs=4, max_pairs=8, seed=5)
    for index in range(20):
        row = task[index]
        assert (row["segment_ids"] > 0).any()
        for segment in range(1, row["segment_ids"].max() + 1):
            ids = row["input_ids"][row["segment_ids"] == segment]
            weights = row["loss_weights"][row["segment_ids"] == segment]
            n = (len(ids) - 2) // 4
            told = dict(zip(ids[1 : 2 * n + 1 : 2], ids[2 : 2 * n + 2 : 2], strict=True))
            assert ids[0] == 1 and ids[2 * n + 1] == 2 and len(told) == n
            asked = dict(zip(ids[2 * n + 2 :: 2], ids[2 * n + 3 :: 2], strict=True))
            assert asked == told
            assert np.flatnonzero(weights).tolist() == list(range(2 * n + 3, 4 * n + 2, 2))
    with pytest.raises(ValueError, match="needs rows of 34 tokens"):
        KeyValueRetrieval(Material((3, 200), 1, 2), 33, max_pairs=8)


def test_retrieval_has_every_number_of_pairs_and_asks_in_another_order():
    task = KeyValueRetrieval(Material((3, 200), 1, 2), 64, min_pairs=4, max_pairs=8, seed=5)
    blocks = [task.block(np.random.default_rng(i)).ids for i in range(60)]
    pairs = [(len(ids) - 2) // 4 for ids in blocks]
    assert set(pairs) == {4, 5, 6, 7, 8}
    same = [ids[1 : 2 * n + 1 : 2].tolist() == ids[2 * n + 2 :: 2].tolist() for ids, n in zip(blocks, pairs, strict=True)]
    assert sum(same) < 10, "of 4 keys one order in 24 is the same by chance"


def test_induction_repeats_and_weighs_the_repetition():
    row = Induction(Material((3, 50), 1, 2), 128, min_period=8, max_period=16)[3]
    ids = row["input_ids"][row["segment_ids"] == 1]
    period = len(ids) // 2
    assert np.array_equal(ids[:period], ids[period:])
    assert row["loss_weights"][row["segment_ids"] == 1].tolist() == [0] * (period + 1) + [1] * (period - 1)


def test_synthetic_rows_depend_on_seed_and_index_alone():
    a, b, c = (Induction(Material((3, 50), 1, 2), 128, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a[7]["input_ids"], b[7]["input_ids"])
    assert not np.array_equal(a[7]["input_ids"], c[7]["input_ids"])
    assert not np.array_equal(a[7]["input_ids"], a[8]["input_ids"])


def test_batches_resume_exactly_where_they_were(corpus):
    def batches():
        return training_batches(corpus, {"text": 0.5, "retrieval": 0.5}, batch_size=3, length=128, seed=1)

    stream = batches()
    for _ in range(4):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    want = [next(stream) for _ in range(3)]
    resumed = batches()
    resumed.set_state(state)
    for a, b in zip(want, (next(resumed) for _ in range(3)), strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


def test_the_mix_keeps_its_shares_and_refuses_nonsense(corpus):
    stream = training_batches(corpus, {"text": 0.75, "induction": 0.25, "retrieval": 0.0}, batch_size=40, length=128, seed=0)
    rows = [r for _ in range(3) for r in next(stream)["loss_weights"]]
    half_weighed = sum(r.mean() < 0.6 for r in rows)
    assert half_weighed == 30
    with pytest.raises(ValueError, match="unknown data source 'txt'"):
        training_batches(corpus, {"txt": 1}, batch_size=1, length=128, seed=0)
    with pytest.raises(ValueError, match="positive share"):
        training_batches(corpus, {"text": 0}, batch_size=1, length=128, seed=0)


def test_rows_too_short_for_a_synthetic_task_are_refused_and_the_shortest_have_answers():
    with pytest.raises(ValueError, match=r"induction .* needs rows of 96 tokens \(seq_len\) or more, got 95"):
        Induction(Material((3, 50), 1, 2), 95)
    shortest = Induction(Material((3, 50), 1, 2), 96), KeyValueRetrieval(Material((3, 50), 1, 2), 82)
    assert all(task[i]["loss_weights"].sum() > 0 for task in shortest for i in range(200))


def test_a_task_needs_as_many_symbols_as_keys():
    with pytest.raises(ValueError, match="20 or more token ids .* the tokenizer has 19"):
        KeyValueRetrieval(Material((3, 22), 1, 2), 128)
    KeyValueRetrieval(Material((3, 23), 1, 2), 128)
