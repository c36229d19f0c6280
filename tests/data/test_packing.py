"""Packing: every token once, whole documents where asked, and the same rows whoever reads them."""

import json

import numpy as np
import pytest

from hybrid_jax.data import training_batches
from hybrid_jax.data.corpus import Source
from hybrid_jax.data.packing import PackedRows
from hybrid_jax.data.tokens import Tokens


def documents(sizes, weights=False):
    starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    learnt = (np.arange(starts[-1]) % 3 == 0).astype(np.uint8) if weights else None
    return Tokens(np.arange(1, starts[-1] + 1), starts, learnt)


SIZES = np.random.default_rng(0).integers(1, 25, 200)


def segments(rows):
    """The tokens of every segment, and its weights."""
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for n in range(1, row["segment_ids"].max() + 1):
            where = row["segment_ids"] == n
            assert np.array_equal(np.flatnonzero(where), np.arange(np.argmax(where), np.argmax(where) + where.sum()))
            found.append((row["input_ids"][where].tolist(), row["loss_weights"][where].tolist()))
        assert not row["loss_weights"][row["segment_ids"] == 0].any()
    return found


def test_first_fit_keeps_documents_whole_and_uses_each_once():
    tokens = documents(SIZES, weights=True)
    rows = PackedRows(tokens, 32, "first_fit")
    found = sorted(segments(rows))
    assert [s for s, _ in found] == [list(range(a + 1, b + 1)) for a, b in zip(tokens.starts[:-1], tokens.starts[1:], strict=True)]
    for ids, weights in found:
        assert weights == [0.0, *tokens.weights[ids[1] - 1 : ids[-1]].tolist()] if len(ids) > 1 else weights == [0.0]
    assert rows.filled > 0.9
    assert len(rows) < len(PackedRows(documents([32] * len(SIZES)), 32, "first_fit"))


@pytest.mark.parametrize("long, want", [("drop", [3, 8]), ("truncate", [3, 8, 8, 8]), ("split", [3, 8, 8, 1, 8, 8, 8])])
def test_documents_longer_than_a_row_are_dropped_cut_or_split(long, want):
    rows = PackedRows(documents([3, 9, 8, 24]), 8, "first_fit", long)
    assert sorted(len(ids) for ids, _ in segments(rows)) == sorted(want)


def test_split_fills_every_row_and_predicts_across_no_border():
    rows = PackedRows(documents(SIZES, weights=True), 32)
    assert len(rows) == SIZES.sum() // 32 and rows.filled == 1
    assert [t for ids, _ in segments(rows) for t in ids] == list(range(1, len(rows) * 32 + 1))
    assert all(weights[0] == 0 for _, weights in segments(rows))


def test_a_row_that_is_not_there_is_an_index_error_so_that_rows_can_be_iterated():
    rows = PackedRows(documents([16]), 8)
    assert len(list(rows)) == 2
    for i in (2, -1):
        with pytest.raises(IndexError, match=f"row {i} of 2"):
            rows[i]


def test_no_documents_and_empty_documents_make_no_rows():
    assert len(PackedRows(documents([]), 8)) == len(PackedRows(documents([]), 8, "first_fit")) == 0
    assert segments(PackedRows(documents([0, 3, 0]), 8, "first_fit")) == [([1, 2, 3], [0, 1, 1])]
    with pytest.raises(ValueError, match="packing 'best': expected one of split, first_fit"):
        PackedRows(documents([3]), 8, "best")


@pytest.mark.parametrize("packing", ["split", "first_fit"])
@pytest.mark.parametrize("weights", [False, True], ids=["text", "the second has weights"])
def test_shards_give_the_rows_of_their_documents_end_to_end(packing, weights):
    shards = [documents([20, 2]), documents([3], weights), documents([]), documents([16, 1, 5])]
    one = Tokens.join(shards, np.uint16)
    assert one.starts.tolist() == [0, 20, 22, 25, 41, 42, 47]
    found, want = PackedRows(Tokens.chained(shards, np.uint16), 8, packing), PackedRows(one, 8, packing)
    assert len(found) == len(want) == {"split": 5, "first_fit": 6}[packing]
    for i in range(len(want)):
        assert all(np.array_equal(found[i][name], want[i][name]) for name in want[i]), i
    ids = np.concatenate([found[i]["input_ids"] for i in range(len(found))])
    assert sorted(ids[ids > 0]) == sorted(one.ids[:40] if packing == "split" else one.ids)


@pytest.mark.parametrize(
    "packing, long, words",
    [
        ("split", "split", "7 of 47 tokens are in no row: the last 7, fewer than a row of 8"),
        ("first_fit", "split", ""),
        ("first_fit", "truncate", "20 of 47 tokens are in no row: 2 documents are longer than a row of 8, and long is 'truncate'"),
        ("first_fit", "drop", "36 of 47 tokens are in no row: 2 documents are longer than a row of 8, and long is 'drop'"),
    ],
)
def test_tokens_that_are_in_no_row_are_counted(packing, long, words):
    rows = PackedRows(documents([20, 2, 8, 16, 1]), 8, packing, long)
    assert rows.unused == words


def test_a_rule_for_long_documents_that_has_no_effect_is_refused():
    for make in (lambda: PackedRows(documents([9]), 8, "split", "drop"), lambda: Source("a.txt", "split", "truncate")):
        with pytest.raises(ValueError, match=r"long = '(drop|truncate)' has no effect with packing = 'split'"):
            make()


MIX = {"text": 0.6, "retrieval": 0.4}


def read(corpus, steps, rows=None, batch_size=6, threads=1):
    stream = training_batches(corpus, MIX, batch_size=batch_size, length=128, seed=3, rows=rows, threads=threads)
    return [next(stream) for _ in range(steps)]


def test_processes_together_read_what_one_alone_reads(corpus):
    alone = read(corpus, 4)
    for parts in ([[0, 1, 2], [3, 4, 5]], [[0], [1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]] * 2):
        for rows in parts:
            for mine, whole in zip(read(corpus, 4, rows, threads=3), alone, strict=True):
                assert all(np.array_equal(mine[k], whole[k][rows]) for k in whole)


def test_a_run_goes_on_with_the_same_rows_on_another_number_of_processes(corpus):
    stream = training_batches(corpus, MIX, batch_size=6, length=128, seed=3, rows=[0, 1, 2])
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    resumed = training_batches(corpus, MIX, batch_size=6, length=128, seed=3, rows=[4, 5])
    resumed.set_state(state)
    want = read(corpus, 5)[3:]
    for batch in want:
        assert np.array_equal(next(resumed)["input_ids"], batch["input_ids"][4:])
