"""What is logged: means over the interval, each source's own loss, also through a checkpoint; and the picture of it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import run_report
from hybrid_jax.data import training_batches
from hybrid_jax.data.layout import SOURCE, training_batch
from hybrid_jax.data.pipeline import sources_of
from hybrid_jax.layers.parameter import Marks
from hybrid_jax.train import MetricWriter, read_metrics, train_phase
from hybrid_jax.train import step as step_module
from hybrid_jax.train.interval import Interval
from hybrid_jax.train.objective import Mean, mean_over_tokens
from hybrid_jax.train.objectives import make_objective
from hybrid_jax.train.state import Health, TrainState
from hybrid_jax.train.step import make_step
from tests.conftest import tiny_model
from tests.train.conftest import Linear, phase

MIX = {"text": 0.6, "retrieval": 0.4, "induction": 0.0}


def measured(loss, weight, sources, bad=0, norm=1.0):
    """A step's metrics; `loss` is a mean over `weight`, `sources` are pairs (sum, weight)."""
    means = {f"loss/{n}": Mean(*pair) for n, pair in sources.items()}
    counts = {"skipped": bad, "skipped_in_a_row": bad, "learning_rate": 0.1}
    metrics = {"loss": Mean(loss * weight, weight), **means, "grad_norm": norm, **counts}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)


def test_an_interval_is_the_mean_over_its_tokens_and_each_source_s_over_its_own():
    interval = Interval()
    interval.add(measured(2.0, 6.0, dict(chat=(4.0, 4.0), web=(8.0, 2.0), code=(0, 0)), norm=1.0))
    interval.add(measured(np.nan, 50.0, dict(chat=(np.nan, 40.0), web=(1.0, 10.0), code=(0, 0)), bad=1))
    interval.add(measured(9.0, 2.0, dict(chat=(0.0, 0.0), web=(18.0, 2.0), code=(0, 0)), norm=5.0))
    want = {"loss": (6 * 2 + 2 * 9) / 8, "grad_norm": (6 + 10) / 8, "loss/chat": 1.0, "loss/web": 26 / 4}
    assert interval.means(interval.take()) == pytest.approx(want)
    interval.add(measured(np.inf, 6.0, dict(chat=(np.inf, 4.0), web=(1.0, 2.0), code=(0, 0)), bad=1))
    assert interval.means(interval.take()) == {}, "no step counted"


def test_an_interval_goes_on_exactly_from_a_checkpoint():
    steps = [measured(x, w, dict(a=(x, w), b=(3 * x, w / 3), c=(0, 0))) for x, w in ((0.1, 3.0), (0.7, 5.0), (0.3, 7.0))]
    whole, begun, resumed = (Interval() for _ in range(3))
    for metrics in steps:
        whole.add(metrics)
    for metrics in steps[:2]:
        begun.add(metrics)
    resumed.set_state(json.loads(json.dumps(begun.state())))
    resumed.add(steps[2])
    assert resumed.means(resumed.take()) == whole.means(whole.take())
    resumed.set_state(json.loads(json.dumps(resumed.state())))
    assert resumed.sums is None


def test_a_source_s_loss_is_over_its_own_tokens_however_the_batch_is_divided(monkeypatch):
    model, rng = tiny_model("*"), np.random.default_rng(0)
    ids = rng.integers(0, 61, (4, 16)).astype(np.int32)
    weights = (rng.random((4, 16)) < [[0.9], [0.1], [0.5], [0.3]]).astype(np.float32)
    rows = {"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": weights, "source": np.array([2, 0, 2, 2])}
    logits = np.asarray(model(ids), np.float64)[:, :-1]
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    want = [[(losses * weights[:, 1:])[rows].sum(), weights[rows, 1:].sum()] for rows in ([1], [], [0, 2, 3])]
    assert weights[:, 0].any(), "the first token is predicted from nothing"
    batch = {n: jnp.asarray(x) for n, x in training_batch(rows).items()}
    per_token = make_objective("next_token", {})(model, batch).tokens
    given = {**batch, "losses": per_token[0], "given": per_token[1]}

    def objective(model, batch, teacher):
        loss = Mean.of(model["w"] * batch["losses"], batch["given"])
        return mean_over_tokens(batch["losses"], batch["given"])._replace(loss=loss)

    monkeypatch.setattr(step_module, "make_objective", lambda name, options: objective)
    for parts in (1, 2):
        p = phase(batch_size=4, accumulate=parts)
        parameters, own = {"w": jnp.ones(())}, {"w": Marks(())}
        state = TrainState(parameters, Linear(p, own).optimizer.init(parameters), jax.tree.map(jnp.copy, Health.new()))
        _, metrics = make_step(Linear(p, own), p, sources="abc")(state, {}, given)
        assert np.allclose([metrics[f"loss/{n}"] for n in "abc"], want, rtol=1e-5)
        assert float(metrics["loss"].weight) == weights[:, 1:].sum()
        interval = Interval()
        interval.add(metrics)
        means = interval.means(interval.take())
        assert means["loss/a"] == pytest.approx(want[0][0] / want[0][1], rel=1e-5) and "loss/b" not in means


def test_rows_say_which_source_they_come_from(corpus):
    retrieval = 1  # of ("retrieval", "text") the marker that only its rows begin with
    assert sources_of(MIX) == ("retrieval", "text")
    for rows in (None, [1, 3]):
        stream = training_batches(corpus, MIX, batch_size=4, length=128, seed=3, rows=rows)
        found = [next(stream) for _ in range(8)]
        sources, first = (np.concatenate(x) for x in zip(*((b["source"], b["input_ids"][:, 0]) for b in found), strict=True))
        assert np.array_equal(sources == 0, first == retrieval) and set(sources) == {0, 1}
    batch = training_batch(found[0], 2)
    assert batch[SOURCE].shape == (2, 128) and np.array_equal(batch[SOURCE][:, 5], found[0]["source"])


def run(corpus, directory, **changes):
    p, writer = phase(seq_len=128, batch_size=2, **changes), MetricWriter(directory)
    where = dict(seed=0, directory=directory / "checkpoints", writer=writer)
    train_phase(tiny_model("*", vocab_size=corpus.tokenizer.get_vocab_size()), "p", p, corpus, MIX, **where)
    writer.close()
    return {r["step"]: r for r in read_metrics(directory)}


def test_the_loop_logs_means_over_its_intervals_and_resumes_within_one(corpus, tmp_path):
    single = run(corpus, tmp_path / "single", log_every=1)
    logged = run(corpus, tmp_path / "several", log_every=3)
    assert sorted(logged) == [1, 3, 6]
    stream = training_batches(corpus, MIX, batch_size=2, length=128, seed=0)
    weights, counts = [], {"retrieval": [], "text": []}
    for _ in range(6):
        rows = next(stream)
        own = rows["loss_weights"][:, 1:].sum(axis=1)
        weights.append(own.sum())
        for number, name in enumerate(counts):
            counts[name].append(own[rows["source"] == number].sum())
    for step, steps in ((1, [1]), (3, [2, 3]), (6, [4, 5, 6])):
        want = np.average([single[s]["loss"] for s in steps], weights=[weights[s - 1] for s in steps])
        assert logged[step]["loss"] == pytest.approx(want, rel=1e-5)
        for name, of in counts.items():
            seen = [s for s in steps if of[s - 1]]
            assert all((f"loss/{name}" in single[s]) == (s in seen) for s in steps)
            assert (f"loss/{name}" in logged[step]) == bool(seen)
            if seen:
                want = np.average([single[s][f"loss/{name}"] for s in seen], weights=[of[s - 1] for s in seen])
                assert logged[step][f"loss/{name}"] == pytest.approx(want, rel=1e-5)
    assert 0 in counts["retrieval"] and any(counts["retrieval"]), "a step without a row of a source, and one with"

    shutil.rmtree(tmp_path / "several" / "checkpoints" / "6")  # the checkpoint of step 4 is within an interval
    (tmp_path / "several" / "metrics.jsonl").unlink()
    again = run(corpus, tmp_path / "several", log_every=3)
    timing = {"tokens_per_second", "data_wait"}
    assert {n: x for n, x in again[6].items() if n not in timing} == {n: x for n, x in logged[6].items() if n not in timing}


def test_the_picture_has_every_source_s_own_loss_and_bridges_intervals_without_one(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(run_report.plt, "close", figures.append)
    rows = {
        "align": [{"step": 1, "loss": 4.0, "loss/text": 4.0, "mixer_mse/01": 8.0}, {"step": 5, "loss": 3.0, "mixer_mse/01": 2.0}],
        "train": [
            {"step": 1, "loss": 2.0, "loss/text": 1.0, "loss/recall": 3.0},
            {"step": 2, "skipped": 1},
            {"step": 3, "loss": 1.5, "loss/text": 1.25},
        ],
    }
    with (tmp_path / "metrics.jsonl").open("w") as f:
        for name, of_phase in rows.items():
            f.writelines(json.dumps({"phase": name, "skipped": 0, **row}) + "\n" for row in of_phase)
    run_report.report_run(tmp_path)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines == {
        "align": [[1, 4.0], [5, 3.0]],
        "train": [[6, 2.0], [8, 1.5]],
        "train: text": [[6, 1.0], [8, 1.25]],
        "train: recall": [[6, 3.0]],
    }
    assert run_report.alignment_of(rows["align"]) == {1: (8.0, 2.0)} and (tmp_path / "run.png").exists()
    worse = [*rows["align"], {"step": 9, "loss": 5.0, "mixer_mse/01": 3.0}]
    assert run_report.alignment_of(worse) == {1: (8.0, 3.0)} and run_report.final_loss(rows["train"]) == 1.5
    assert run_report.final_loss(rows["train"][:2]) == 2.0 and np.isnan(run_report.final_loss(rows["train"][1:2]))


def test_the_picture_has_the_held_out_loss_of_the_evaluations_at_their_steps(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(run_report.plt, "close", figures.append)
    evaluated = {"eval/loss": 3.5, "eval/loss/text": 3.5, "eval/retrieval": 0.5}
    rows = [
        {"phase": "align", "step": 5, "loss": 4.0},
        {"phase": "train", "step": 1, "loss": 3.0},
        {"phase": "train", "step": 2, **evaluated},  # between two log lines
        {"phase": "train", "step": 4, "loss": 2.0, **evaluated, "eval/loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_report.report_run(tmp_path)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines == {"align": [[5, 4.0]], "train": [[6, 3.0], [9, 2.0]], "train: held-out": [[7, 3.5], [9, 2.5]]}
