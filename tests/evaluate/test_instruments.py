"""Instruments against plain numpy on the model's logits, and the intervals of their numbers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import ModelConfig
from hybrid_jax.evaluate.instruments import make_instrument, speed, text
from hybrid_jax.evaluate.instruments.contract import Subject
from hybrid_jax.evaluate.instruments.recall import _complete
from hybrid_jax.evaluate.instruments.text import _bytes
from hybrid_jax.evaluate.measurement import buckets, weighted_mean
from hybrid_jax.evaluate.token_scores import TokenScores
from hybrid_jax.generation import generate
from hybrid_jax.memory import state_bytes
from hybrid_jax.parameters import split_model
from tests.conftest import tiny_config, tiny_model

LENGTH = 64


@pytest.fixture(scope="module")
def subject(corpus):
    model = tiny_model("*-GKA-SWA", vocab_size=300)
    return Subject(model, corpus.tokenizer, corpus)


def by_hand(model, rows):
    """(losses, right) [rows, T] of every token given those before it in its segment, from the logits, in float64."""
    losses, right = np.zeros((2, len(rows), LENGTH))
    for n, row in enumerate(rows):
        logits = np.asarray(model(row["input_ids"][None], row["segment_ids"][None])[0], np.float64)[:-1]
        ids = row["input_ids"][1:]
        losses[n, 1:] = np.log(np.exp(logits).sum(-1)) - logits[np.arange(LENGTH - 1), ids]
        right[n, 1:] = logits.argmax(-1) == ids
    return losses, right


def found(measurements, measure, **at):
    (one,) = [m for m in measurements if m.measure == measure and dict(m.at) == at]
    return one.value


def test_text_is_the_mean_over_tokens_that_count_and_by_position_and_bytes(subject):
    instrument = make_instrument("x", dict(instrument="text", seq_len=LENGTH, rows=5, batch_size=2))
    got = instrument.measure(subject)
    packed = subject.corpus.held_out_rows(LENGTH)
    rows = [packed[i] for i in np.unique(np.linspace(0, len(packed) - 1, 5).astype(int))]
    losses, weights = by_hand(subject.model, rows)[0], np.stack([r["loss_weights"] for r in rows])
    assert weights.sum() == weights.size - len(rows)  # the first token of a row is predicted by nothing
    mean = np.average(losses, weights=weights)
    assert found(got, "loss") == pytest.approx(mean, rel=1e-5)
    assert found(got, "perplexity") == pytest.approx(math.exp(mean), rel=1e-5)
    text = sum(len(subject.tokenizer.decode(r["input_ids"][r["loss_weights"] > 0].tolist()).encode()) for r in rows)
    assert found(got, "bits_per_byte") == pytest.approx((losses * weights).sum() / text / math.log(2), rel=1e-5)
    for part, at in ((np.s_[:, 1:9], 8), (np.s_[:, 9:17], 16), (np.s_[:, 33:], 63)):
        assert found(got, "loss", position=at) == pytest.approx(np.average(losses[part], weights=weights[part]), rel=1e-5)


def test_recall_is_over_the_answers_alone_and_by_the_distance_of_their_evidence(subject):
    instrument = make_instrument(
        "x", dict(instrument="recall", task="needles", seq_len=LENGTH, rows=6, batch_size=4, options={"max_needles": 3})
    )
    instrument.check(subject.model.config, subject.corpus)
    got = instrument.measure(subject)
    task = subject.corpus.task("needles", LENGTH, 987_654_321, held_out=True, max_needles=3)
    rows = [task.example(i) for i in range(6)]
    losses, right = by_hand(subject.model, rows)
    distances = np.stack([r["distances"] for r in rows])
    assert found(got, "accuracy") == pytest.approx(right[distances > 0].mean())
    assert found(got, "loss") == pytest.approx(losses[distances > 0].mean(), rel=1e-5)
    near = (distances > 8) & (distances <= 16)
    assert near.any() and found(got, "accuracy", distance=16) == pytest.approx(right[near].mean())


def test_a_grid_measures_every_combination_of_its_options(subject):
    grid = {"seq_len": (32, LENGTH), "min_needles,max_needles": (1, 2)}
    values = dict(instrument="recall", task="needles", rows=2, options={"ask": "end"}, grid=grid)
    got = make_instrument("x", values).measure(subject)
    assert [dict(m.at) for m in got if m.measure == "loss"] == [{"seq_len": n, "needles": k} for n in (32, LENGTH) for k in (1, 2)]
    alone = make_instrument(
        "x", {**values, "grid": {}, "seq_len": 32, "options": {"ask": "end", "min_needles": 2, "max_needles": 2}}
    )
    assert found(got, "loss", seq_len=32, needles=2) == pytest.approx(found(alone.measure(subject), "loss"))


def test_an_answer_is_complete_if_all_its_tokens_are_right():
    answers = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 1]], bool)
    right = np.array([[0, 1, 1, 0, 1, 0, 1, 1, 1]], bool)
    assert _complete(right, answers).astype(int).tolist() == [[0, 1, 1, 0, 0, 0, 1, 0, 1]]


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        weights = rng.integers(1, 9, (40, 1)) * np.ones((1, 5))  # rows count differently, and their tokens agree
        values = 2 + rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 5))
        m = weighted_mean("loss", values, weights)
        inside += m.low <= 2 <= m.high
    assert 0.90 < inside / 400 < 0.98


@pytest.mark.parametrize("rows", [2, 5])
def test_the_interval_of_a_mean_of_few_rows_covers_it_as_often_as_it_says(rows):
    values = 2 + np.random.default_rng(0).normal(size=(1000, rows, 1))
    means = [weighted_mean("loss", v, np.ones((rows, 1))) for v in values]
    assert 0.93 < np.mean([m.low <= 2 <= m.high for m in means]) < 0.97


@pytest.mark.parametrize("rows", [4, 16])
def test_the_interval_of_a_share_of_few_rows_covers_it_as_often_as_it_says_or_more(rows):
    rng = np.random.default_rng(0)
    right = rng.random((600, rows, 16)) < rng.beta(1, 1, (600, rows, 1))  # rows are harder or easier
    shares = [weighted_mean("accuracy", r, np.ones((rows, 16)), share=True) for r in right]
    assert 0.92 < np.mean([m.low <= 0.5 <= m.high for m in shares]) < 0.98


def test_a_share_of_rows_that_happen_to_be_alike_is_no_more_certain_than_its_number_of_answers():
    right = np.arange(100) < np.array([[49], [50]])
    share = weighted_mean("accuracy", right, np.ones((2, 100)), share=True)
    assert share.high - share.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / (200 + 1.96**2)), rel=1e-3)


def test_values_of_weight_0_do_not_count_even_if_they_are_no_numbers():
    values, weights = np.array([[1.0, np.nan], [np.inf, 3.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    assert weighted_mean("loss", values, weights).value == 2


def test_the_interval_of_one_row_says_that_nothing_is_known():
    m = weighted_mean("loss", np.ones((1, 4)), np.ones((1, 4)))
    assert (m.value, m.low, m.high) == (1, -math.inf, math.inf)


def test_the_interval_of_a_share_is_not_empty_where_all_rows_agree():
    everything = weighted_mean("accuracy", np.ones((16, 4)), np.ones((16, 4)), share=True)
    assert everything.value == 1 and everything.high == pytest.approx(1) and everything.low == pytest.approx(1 - 0.1936, abs=1e-3)
    half = weighted_mean("accuracy", np.repeat([[0.0], [1.0]], 8, axis=0), np.ones((16, 1)), share=True)
    assert half.low == pytest.approx(1 - half.high) and 0.25 < half.low < 0.31
    assert weighted_mean("accuracy", np.ones((3, 2)), np.zeros((3, 2))) is None


@pytest.mark.parametrize("length", [1, 8, 9, 63, 64, 1023])
def test_buckets_cover_every_place_once(length):
    found = buckets(length)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))


def test_the_bytes_of_a_sequence_are_keys_and_values_and_states():
    config: ModelConfig = tiny_config("*-SWA-GKA")  # windows of 6; states of 2 x 4 heads x 8 x 8 in float32
    convolutions = state_bytes(tiny_config("GKA"), 64) - 2 * 4 * 8 * 8 * 4
    attention = 2 * 2 * 8 * 2 + 2 * 4  # keys and values of 2 heads in bfloat16; a position and a segment
    assert state_bytes(tiny_config("*-*"), 128) - state_bytes(tiny_config("*-*"), 64) == 2 * 64 * attention
    grown = state_bytes(config, 4096) - state_bytes(config, 2048)
    assert grown == 2048 * attention and convolutions > 0  # windows and states do not grow
    next_slot = 4
    assert state_bytes(tiny_config("SWA"), 3) == 3 * attention + next_slot  # no more than there are tokens
    assert state_bytes(tiny_config("SWA"), 64) == 5 * attention + next_slot  # a window of 6 remembers 5
    bmojo = [state_bytes(tiny_config("BMF"), n) - state_bytes(tiny_config("GKA"), n) for n in (3, 64)]
    assert bmojo == [2 * (n * attention + next_slot) for n in (3, 2 * 4 - 1)]  # windows of 4, and what fades behind them


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"instrument": "telescope"},
            "expected one of text, recall, composed_recall, heads, mixing, prompts, experts, cost, speed, got 'telescope'",
        ),
        ({"instrument": "text", "sequence": 3}, "text has no option 'sequence'"),
        ({"instrument": "text", "rows": 0}, "rows"),
        ({"instrument": "recall", "grid": {"depth": ()}}, "no values for 'depth'"),
        ({"instrument": "cost", "lengths": (0,)}, "lengths"),
        ({"instrument": "cost", "dtype": "float7"}, "bfloat16"),
    ],
)
def test_what_an_instrument_does_not_know_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_instrument("mine", values)


def test_options_are_checked_against_model_and_data(corpus):
    config = dataclasses.replace(tiny_config("*-*"), max_position_embeddings=64)
    for values, message in (
        (dict(instrument="text", seq_len=65), "max_position_embeddings, 64"),
        (dict(instrument="text", seq_len=64, sources=("web",)), "no source is named 'web'"),
        (dict(instrument="recall", seq_len=64, task="riddles"), "no synthetic task is named 'riddles'"),
        (dict(instrument="recall", seq_len=64, options={"pairs": 3}), "no option 'pairs'; known: min_pairs"),
        (dict(instrument="recall", seq_len=64, task="parity", grid={"seq_len": (64, 128)}), "seq_len 128"),
        (dict(instrument="recall", seq_len=64, task="parity", options={"seq_len": 128}), "seq_len 128"),
        (dict(instrument="recall", seq_len=64, grid={"max_pairs": (2, 40)}), "retrieval of 40 pairs needs rows of 162"),
    ):
        with pytest.raises(ValueError, match=message):
            make_instrument("mine", values).check(config, corpus)


def test_speed_is_tokens_per_second_of_programs_that_decode_as_the_model_does(subject, monkeypatch):
    instrument = make_instrument("x", dict(instrument="speed", lengths=(5,), batch_size=2, new_tokens=3, repeats=2))
    structure, parameters = split_model(subject.model)
    prefill, decode = instrument._programs(structure, 5)
    prompt = jnp.ones((2, 5), jnp.int32)
    new = generate(subject.model, [[1] * 5], max_new_tokens=4)[0]
    assert decode(parameters, *prefill(parameters, prompt)).tolist() == [[new[-1]]] * 2
    monkeypatch.setattr(speed, "_seconds", lambda run, repeats: run() is not None and [0.5, 0.25])
    got = {m.measure: m.value for m in instrument.measure(subject)}
    assert got == {"prefill": pytest.approx(10 * 3), "decode": pytest.approx(6 * 3)}  # the mean of 2 and 4 runs per second
    with pytest.raises(ValueError, match="max_position_embeddings"):
        make_instrument("x", dict(instrument="speed", lengths=(5000,))).check(subject.model.config, subject.corpus)


def test_the_overall_accuracy_of_a_grid_is_over_the_answers_of_all_its_points(subject):
    values = dict(instrument="recall", task="retrieval", rows=3, grid={"min_pairs,max_pairs": (2, 7)}, seq_len=LENGTH)
    got = make_instrument("x", values).measure(subject)
    alone = [m for m in got if m.measure == "accuracy" and m.at]
    right, asked = (sum(pair[n] for m in alone for pair in m.sums) for n in (0, 1))
    assert got[0].at == {} and got[0].value == pytest.approx(right / asked)
    pairs = [[m.sums[i] for m in alone] for i in range(3)]  # row i of every point: the same random numbers, so one sample
    assert got[0].sums == tuple((sum(a for a, _ in same), sum(b for _, b in same)) for same in pairs) and got[0].count == 3


def test_the_rows_of_one_number_at_all_points_of_a_grid_have_the_same_random_numbers(subject):
    near, far = (subject.corpus.task("needles", LENGTH, 1, max_needles=1, ask="end", depth=d).example(0) for d in (1.0, 0.0))
    assert (near["input_ids"][-4:] == far["input_ids"][-4:]).all() and near["distances"].max() < far["distances"].max()


def test_the_bytes_of_a_byte_level_tokenizer_are_those_of_the_text_where_a_row_begins_within_a_character(subject):
    tokenizer, text = subject.corpus.tokenizer, "漢字 def f"
    ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]  # a token per byte of 漢 and 字, and no byte
    for skipped, size in ((0, len(text.encode())), (1, len(text.encode()) - 1), (len(ids) - 1, 1), (len(ids), 0)):
        weights = np.array([0.0] * skipped + [1.0] * (len(ids) - skipped))
        assert _bytes(tokenizer, {"input_ids": np.array(ids), "loss_weights": weights}) == size


def test_the_perplexity_of_a_model_that_diverged_is_infinite(subject, monkeypatch):
    def scores(model, rows, **_):
        return TokenScores(np.full((len(rows), LENGTH), 800.0), np.zeros((len(rows), LENGTH)), np.ones((len(rows), LENGTH)))

    monkeypatch.setattr(text, "token_scores", scores)
    got = make_instrument("x", dict(instrument="text", seq_len=LENGTH, rows=2)).measure(subject)
    assert found(got, "loss") == 800 and found(got, "perplexity") == math.inf
