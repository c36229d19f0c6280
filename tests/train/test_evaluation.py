"""Evaluation during a phase: its values are `evaluate`'s, it changes nothing, the best checkpoint stays, hooks are called."""

import numpy as np
import pytest

from hybrid_jax.evaluate.instruments import Subject
from hybrid_jax.evaluate.instruments.recall import Recall
from hybrid_jax.evaluate.instruments.text import TextLoss
from hybrid_jax.train import MetricWriter, read_metrics, train_phase
from hybrid_jax.train.evaluation import Evaluation
from hybrid_jax.train.hook import Hook
from tests.train.conftest import MIX, arrays, losses, model_for, phase, saved_steps, train


def test_an_evaluation_is_evaluate_s_own_and_does_not_change_the_training(corpus, tmp_path):
    want = arrays(train(corpus, tmp_path / "plain", seq_len=96))
    model = train(corpus, tmp_path / "evaluated", seq_len=96, eval_every=4, eval_rows=3)
    assert all(np.array_equal(want[n], x) for n, x in arrays(model).items())
    assert losses(tmp_path / "plain") == losses(tmp_path / "evaluated")
    rows = {r["step"]: r for r in read_metrics(tmp_path / "evaluated")}
    assert [s for s in rows if "eval/loss" in rows[s]] == [4, 6] and "loss" in rows[6]
    subject = Subject(model, corpus.tokenizer, corpus)
    sixteen = Recall(options={"min_pairs": 16, "max_pairs": 16}, seq_len=96, rows=3)
    loss, accuracy = (one.measure(subject)[0].value for one in (TextLoss(seq_len=96, rows=3), sixteen))
    assert rows[6]["eval/loss"] == rows[6]["eval/loss/text"] == pytest.approx(loss, rel=1e-6)
    assert rows[6]["eval/retrieval"] == accuracy


def test_the_best_checkpoint_stays_and_a_resumed_run_remembers_it(corpus, tmp_path, monkeypatch):
    """Step 2 is the best, and neither among the newest nor one that `checkpoint_every` saves."""
    monkeypatch.setattr(Evaluation, "__call__", lambda self, view: {"eval/loss": [3.0, 1.0, 2.0, 2.5, 1.5, 4.0][view.step - 1]})
    given = dict(eval_every=1, eval_rows=2, keep_best=True, keep=1, checkpoint_every=100, schedule="constant")
    for steps in (4, 6):
        train(corpus, tmp_path, steps=steps, **given)
        assert saved_steps(tmp_path) == [2, steps]
    found = [r["eval/best_step"] for r in read_metrics(tmp_path) if "eval/loss" in r]
    assert found == [1, 2, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="phase.keep_best needs a phase.eval_every"):
        phase(keep_best=True)


class Counting(Hook):
    name = "counting"
    calls = 0

    def __call__(self, view):
        self.calls += 1
        return {"count/calls": self.calls, "count/layers": len(view.model.config.layers), "count/step": view.step}

    def state(self):
        return {"calls": self.calls}

    def set_state(self, state):
        self.calls = state["calls"]


def test_a_hook_is_called_with_the_step_s_model_and_its_state_is_resumed(corpus, tmp_path):
    for steps in (4, 6):
        writer = MetricWriter(tmp_path)
        where = dict(seed=0, directory=tmp_path / "checkpoints", writer=writer, hooks=(Counting(2),))
        train_phase(model_for(corpus), "p", phase(steps=steps, schedule="constant"), corpus, MIX, **where)
        writer.close()
    found = {r["step"]: (r["count/calls"], r["count/layers"]) for r in read_metrics(tmp_path) if "count/step" in r}
    assert found == {2: (1, 2), 4: (2, 2), 6: (3, 2)}
