"""Scorers of layers: one compiled program scores as one evaluation per layer does, files of scores, a scorer of one's own."""

import dataclasses

import jax
import numpy as np
import pytest

from hybrid_jax.config import SWAConfig
from hybrid_jax.data import HELD_OUT_SEED, SELECTION_SEED
from hybrid_jax.evaluate.measures import evenly_spaced, retrieval_rows
from hybrid_jax.parallel.mesh import abstract_mesh
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.selection.scorers import SCORERS, swa_retrieval
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.select import Selection, choose_pattern, score_layers, select_fields, uncertain_choice
from tests.conftest import loss_and_accuracy, tiny_config, tiny_model

LENGTH, ROWS = 70, 3


@dataclasses.dataclass(frozen=True)
class LastFirst:
    """A toy: the later a layer, the cheaper."""

    step: float = 1.0

    def check(self, config, mesh):
        if self.step <= 0:
            raise ValueError(f"select.step must be above 0, got {self.step}")

    def score(self, model, corpus, mesh):
        return Scores(-self.step * np.arange(model.config.num_layers), "steps")


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(SCORERS, "last_first", f"{__name__}:LastFirst")


def test_one_program_scores_as_one_evaluation_per_layer(corpus):
    """Windows differ by layer in the source, so that its layers do not repeat and the third and fourth do."""
    vocabulary = corpus.tokenizer.get_vocab_size()
    model = tiny_model("*-*-*-*", vocab_size=vocabulary, attention_windows=(None, 9, None, None))

    packed = corpus.rows("text", LENGTH, 0)
    text = [packed[i] for i in evenly_spaced(len(packed), ROWS)]

    def loss(candidate):
        sets = text, retrieval_rows(corpus, LENGTH, ROWS, seed=SELECTION_SEED)
        return sum(loss_and_accuracy(candidate, rows)[0] for rows in sets)

    narrow = join_model(*split_model(model))
    narrow.config = model.config.with_options(SWAConfig(2))
    patterns = ["-".join("SWA" if n == i else "*" for n in range(4)) for i in range(4)]
    want = np.array([loss(initialize_hybrid(narrow, p)) for p in patterns]) - loss(model)

    swa_retrieval._replace.clear_cache()
    got = score_layers(model, corpus, Selection(options=dict(window=2, rows=ROWS, seq_len=LENGTH))).per_layer()
    assert swa_retrieval._replace._cache_size() == 1
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.argsort(got).tolist() == np.argsort(want).tolist() and np.ptp(want) > 1e-4
    other = score_layers(model, corpus, Selection(options=dict(window=2, rows=ROWS, seq_len=LENGTH, task="needles"))).per_layer()
    needles = [corpus.task("needles", LENGTH, SELECTION_SEED)[i] for i in range(ROWS)]

    def recall(candidate):
        return sum(loss_and_accuracy(candidate, rows)[0] for rows in (needles, text))

    assert other[0] == pytest.approx(recall(initialize_hybrid(narrow, patterns[0])) - recall(model), abs=1e-5)
    with pytest.raises(ValueError, match="no synthetic task is named 'nothing'"):
        score_layers(model, corpus, Selection(options=dict(rows=ROWS, seq_len=LENGTH, task="nothing")))
    jax.clear_caches()


def test_layers_are_chosen_by_no_row_that_an_evaluation_measures(corpus):
    def contents(rows):
        return {row["input_ids"].tobytes() for row in rows}

    needles = corpus.task("needles", LENGTH, HELD_OUT_SEED, held_out=True)
    for task, measured in (("retrieval", retrieval_rows(corpus, LENGTH, 16)), ("needles", [needles[i] for i in range(16)])):
        scorer = swa_retrieval.SwaRetrieval(rows=16, seq_len=LENGTH, task=task)
        assert len(contents(scorer.task_rows(corpus))) == len(contents(measured)) == 16
        assert not contents(scorer.task_rows(corpus)) & contents(measured)
        assert contents(scorer.text_rows(corpus)) <= contents(corpus.rows("text", LENGTH, 0))


def test_a_choice_within_the_noise_of_the_rows_is_said():
    clear = Scores([0.1, 0.5, 0.2, 0.6], "nats", np.full(4, 0.01))
    assert uncertain_choice(clear, "GKA-*-GKA-*") == "" and uncertain_choice(Scores([0.1, 0.1], "nats"), "GKA-*") == ""
    close = Scores([0.1, 0.5, 0.48, 0.6], "nats", np.full(4, 0.01))
    assert "whether to convert layer 2 or layer 1:" in uncertain_choice(close, "GKA-*-GKA-*")
    assert uncertain_choice(close, "GKA-*-*-*") == "" and uncertain_choice(close, "GKA-GKA-GKA-*") == ""
    one = Scores([0.1, 0.5, 0.48, 0.6], "nats", np.full(4, np.inf))  # a single row
    assert "layers 0, 2 or layers 1, 3" in uncertain_choice(one, "GKA-*-GKA-*")
    with pytest.raises(ValueError, match="the shape of the costs"):
        Scores([0.1, 0.2], "nats", np.zeros(3))


def test_the_error_of_a_cost_is_that_of_a_mean_over_rows():
    rng = np.random.default_rng(0)
    weights, rises = rng.integers(1, 9, (1, 40)), rng.normal(0.3, 0.1, (2, 40))
    source = rng.normal(2.0, 1.0, (1, 40))  # what all models find hard drops out
    sums = np.stack([np.concatenate([source, source + rises]) * weights, np.repeat(weights, 3, axis=0)], axis=2)
    costs, errors = swa_retrieval._costs(sums)
    assert np.allclose(costs, (rises * weights).sum(1) / weights.sum())
    picks = rng.integers(0, 40, (2000, 40))
    bootstrap = ((rises * weights)[:, picks].sum(2) / weights[:, picks].sum(2)).std(1)
    assert np.allclose(errors, bootstrap, rtol=0.1)


def test_rows_that_the_mesh_does_not_divide_are_refused():
    mesh = abstract_mesh({"data": 2, "seq": 4})
    Selection(options=dict(seq_len=80)).check(tiny_config("*-*"), mesh)
    with pytest.raises(ValueError, match="'seq' divides seq_len in 8 shards"):
        Selection(options=dict(seq_len=84)).check(tiny_config("*-*"), mesh)


def test_a_scorer_of_ones_own_is_chosen_by_its_name_and_takes_options(registered, tmp_path):
    how = {"mixer": "GDN", "fraction": 0.5, "scorer": "last_first", "step": 2.0}
    assert choose_pattern(tiny_model("*-*-*-*"), "", Selection.from_config(how), None, tmp_path) == "*-*-GDN-GDN"
    assert select_fields(how)["step"] == 1.0
    with pytest.raises(ValueError, match=r"select\.step must be above 0"):
        Selection.from_config({**how, "step": -1.0}).check(tiny_config("*-*"))
    with pytest.raises(ValueError, match="unknown key 'window'.*known: step"):
        Selection.from_config({**how, "window": 4})
    with pytest.raises(ValueError, match="select.scorer must be one of"):
        Selection(scorer="nothing")


def test_scores_of_heads_are_kept_and_give_no_pattern_of_layers():
    scores = Scores(np.zeros((2, 4)), "nats")
    assert scores.of_heads
    with pytest.raises(ValueError, match="scores heads"):
        scores.per_layer()


def test_a_file_of_scores_costs_the_fall_of_the_tasks_mean_and_is_refused_if_it_is_of_another_model(tmp_path):
    file = tmp_path / "scores.csv"
    how = {"mixer": "GKA", "fraction": 0.5, "scorer": "score_file", "path": str(file)}
    with pytest.raises(FileNotFoundError, match="no such file"):
        Selection.from_config(how).check(tiny_config("*-*"))
    file.write_text("layer_num,icl,rag\n1,60,40\n0,40,50\n-1,70,50\n")
    selection = Selection.from_config(how)
    assert score_layers(tiny_model("*-*"), None, selection).per_layer() == [15.0, 10.0]
    for text, words in (
        ("layer_num,icl\n-1,1\n0,1\n", "no row for layer_num 1"),
        ("layer_num,icl\n-1,1\n0,1\n1,1\n2,1\n", "a row for layer_num 2"),
        ("layer_num,icl\n0,1\n1,1\n", "no row for layer_num -1"),
        ("layer_num,icl\n-1,1\n0,x\n", "line 3"),
        ("layer_num,icl\n-1,1\n0,1\n0,1\n", "layer 0 twice"),
        ("layer,icl\n", "the first line must be"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            selection.check(tiny_config("*-*"))
