"""Synthetic tasks: every answer is determined by the tokens at its distance, and options do what they say."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from hybrid_jax.data.corpus import Corpus, Source, read_tasks
from hybrid_jax.data.tasks import TASKS, Induction, KeyValueRetrieval, Material, Needles, make_task, options_of
from hybrid_jax.data.tokens import Tokens
from tests.data.conftest import Text

MATERIAL = Material((3, 60), 1, 2, Text)
MANY = dict(
    retrieval=[{}, dict(key_tokens=3, value_tokens=4, max_pairs=5), dict(min_pairs=4, max_pairs=4, key_tokens=2)],
    induction=[{}, dict(min_period=16, max_period=60)],
    needles=[{}, dict(ask="end", max_needles=3), dict(ask="end", depth=0.5, min_needles=2, max_needles=2, key_tokens=2)],
)


@pytest.mark.parametrize("name, options", [(name, options) for name, many in MANY.items() for options in many])
def test_the_token_at_an_answers_distance_is_the_answer(name, options):
    assert set(MANY) <= set(TASKS)
    task = make_task(name, options, MATERIAL, 128, seed=3, weight=2.5)
    answers = 0
    for index in range(30):
        row = task.example(index)
        where = np.flatnonzero(row["distances"])
        back = where - row["distances"][where]
        assert (row["input_ids"][where] == row["input_ids"][back]).all()
        assert (row["segment_ids"][where] == row["segment_ids"][back]).all()
        assert (row["loss_weights"][where] == 2.5).all()
        assert row["loss_weights"][0] == 0 and len(row["input_ids"]) == 128
        assert set(task[index]) == {"input_ids", "segment_ids", "loss_weights"}
        answers += len(where)
    assert answers > 60


def test_a_phonebook_has_distinct_names_and_answers_of_several_tokens():
    task = KeyValueRetrieval(Material((3, 13), 1, 2), 64, min_pairs=4, max_pairs=4, key_tokens=2, value_tokens=3)
    for index in range(20):
        row = task.example(index)
        ids = row["input_ids"][1:21].reshape(4, 5)
        assert len(np.unique(ids[:, :2], axis=0)) == 4
        weights = row["loss_weights"][22:42].reshape(4, 5)
        assert (weights == [0, 0, 1, 1, 1]).all()


def test_needles_stand_in_text_in_its_order_and_only_there_text_counts():
    task = Needles(MATERIAL, 64, min_needles=2, max_needles=2, weight=4.0, text_weight=0.5)
    for index in range(20):
        row = task.example(index)
        ids, weights = row["input_ids"], row["loss_weights"]
        text = ids >= 100
        start = ids[text][0]
        assert text.sum() == 64 - 4 * 4 and (ids[text] == start + np.arange(text.sum()) % 10).all()
        assert (ids == 1).sum() == 2 == (ids == 2).sum() and (row["segment_ids"] == 1).all()
        assert set(weights[text].tolist()) <= {0.0, 0.5} and weights.sum() == 4.0 * 4 + 0.5 * (text.sum() - 1)
        asked = np.flatnonzero(ids == 2)
        assert all(row["distances"][i + 2] > 0 and row["distances"][i + 1] == 0 for i in asked)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_needle_stands_at_its_depth_and_is_asked_at_the_end(depth):
    task = Needles(MATERIAL, 128, min_needles=1, max_needles=1, ask="end", depth=depth)
    for index in range(5):
        ids = task.example(index)["input_ids"]
        assert np.flatnonzero(ids == 2).tolist() == [124]
        assert np.flatnonzero(ids == 1).tolist() == [round(depth * 120)]


def test_needles_that_are_not_asked_distract_and_every_value_is_told_at_its_own_depth():
    task = Needles(MATERIAL, 128, min_needles=5, max_needles=5, values=3, asked=2, ask="end")
    for i in range(5):
        ids = task[i]["input_ids"]
        assert (ids == MATERIAL.pairs_id).sum() == 15 and (ids == MATERIAL.ask_id).sum() == 2
        assert np.flatnonzero(ids == MATERIAL.ask_id).tolist() == [128 - 16, 128 - 8]
        assert (task.example(i)["distances"] > 0).sum() == 2 * 3 * 2
        assert len(np.unique(np.diff(np.flatnonzero(ids == MATERIAL.pairs_id)))) > 3, "places differ"


def test_needles_are_told_and_asked_everywhere():
    task = Needles(MATERIAL, 256, min_needles=1, max_needles=1)
    rows = [task.example(i) for i in range(400)]
    told, distances = (
        np.array([f(r) for r in rows]) for f in (lambda r: np.flatnonzero(r["input_ids"] == 1)[0], lambda r: r["distances"].max())
    )
    assert told.min() < 8 and told.max() > 200 and distances.min() <= 8 and distances.max() > 220
    assert abs(np.mean(distances) - 248 / 3) < 12  # two uniform places are a third of the row apart on average


@pytest.mark.parametrize(
    "task, options, message",
    [
        (Needles, dict(ask="later"), "needles: ask must be one of 'anywhere', 'end'"),
        (Needles, dict(depth=0.5), "needs ask = 'end'"),
        (Needles, dict(max_needles=40), "need rows of 321 tokens"),
        (Needles, dict(min_needles=5, max_needles=4), "min_needles and max_needles must satisfy"),
        (KeyValueRetrieval, dict(key_tokens=0), "at least 1"),
        (KeyValueRetrieval, dict(key_tokens=9, max_pairs=2), "key_tokens must be an integer at least 1 and at most 8, got 9"),
        (Needles, dict(value_tokens=0), "value_tokens must be an integer at least 1"),
        (Needles, dict(key_tokens=0), "key_tokens must be an integer"),
        (KeyValueRetrieval, dict(min_pairs=0), "min_pairs and max_pairs must satisfy 1 <= min <= max"),
        (Induction, dict(min_period=1), "min_period and max_period must satisfy 2 <= min"),
    ],
)
def test_options_out_of_range_are_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(MATERIAL, 128, **options)


def test_needles_without_text_are_refused():
    with pytest.raises(ValueError, match="there is none"):
        Needles(Material((3, 60), 1, 2), 128)


def test_tasks_of_a_config_have_names_and_options_of_their_own(corpus):
    tasks = read_tasks({"tasks": {"long": {"task": "retrieval", "max_pairs": 3}}})
    assert tasks["long"]["max_pairs"] == 3 and tasks["retrieval"] == {"task": "retrieval"}
    for values, message in (
        ({"task": "riddles"}, "data.tasks.long: unknown task 'riddles'"),
        ({"task": "needles", "pairs": 1}, "has no option 'pairs'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tasks({"tasks": {"long": values}})
    assert "min_pairs" in options_of("retrieval") and "weight" not in options_of("retrieval")


def test_held_out_needles_stand_in_held_out_text_and_training_ones_in_training_text(corpus):
    def texts(rows):
        found = [rows[i]["input_ids"] for i in range(len(rows))]
        return {tuple(ids[i : i + 12]) for ids in found for i in range(len(ids) - 12)}

    held_out, train = texts(corpus.held_out_rows(64)), texts(corpus.rows("text", 64, 0))
    for rows, own in (
        (corpus.task("needles", 64, 1, held_out=True, max_needles=1), held_out),
        (corpus.task("needles", 64, 1, max_needles=1), train),
    ):
        beginning = {tuple(rows[i]["input_ids"][:12]) for i in range(40)}
        beginning = {ids for ids in beginning if not {1, 2} & set(ids)}
        assert beginning and beginning <= own


def test_keys_are_distinct_also_where_all_of_them_are_used():
    task = KeyValueRetrieval(Material((3, 8), 1, 2), 160, min_pairs=25, max_pairs=25, key_tokens=2)
    keys = task.example(0)["input_ids"][1:76].reshape(25, 3)[:, :2]
    assert sorted(map(tuple, keys.tolist())) == [(a, b) for a in range(3, 8) for b in range(3, 8)]
    with pytest.raises(ValueError, match="there are only 25 keys of 2 tokens, fewer than 26 pairs"):
        KeyValueRetrieval(Material((3, 8), 1, 2), 160, max_pairs=26, key_tokens=2)


def test_needles_stand_in_complete_rows_also_of_a_source_whose_rows_are_padded():
    tokens = Tokens(np.arange(100, 400, dtype=np.uint16), np.array([0, 90, 190, 300]))
    sources = {"chat": Source("", "first_fit")}
    corpus = Corpus(Tokenizer(models.BPE()), sources, {"chat": [tokens]}, {"chat": [tokens]}, (1, 2), (3, 60))
    assert not (corpus.rows("chat", 128, 0)[0]["segment_ids"] > 0).all()
    rows = [corpus.task("needles", 128, seed)[0]["input_ids"] for seed in range(5)]
    assert all((ids > 0).all() and len(np.unique(ids[ids >= 100])) == (ids >= 100).sum() for ids in rows)


def test_only_a_task_that_stands_in_text_is_another_one_with_another_text():
    def identity(end, task):
        tokens = Tokens(np.arange(100, end, dtype=np.uint16), np.array([0, end - 100]))
        corpus = Corpus(Tokenizer(models.BPE()), {"text": Source("")}, {"text": [tokens]}, {"text": [tokens]}, (1, 2), (3, 60))
        return corpus.identity({task: 1.0})

    assert identity(300, "retrieval") == identity(301, "retrieval") and identity(300, "needles") != identity(301, "needles")
