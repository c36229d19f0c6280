"""More steps for a phase of a run: what goes on, from where, with which learning rates, and what is refused."""

import json

import numpy as np
import pytest

from hybrid_jax import load_model
from hybrid_jax.experiment import run_experiment
from hybrid_jax.lengthen import lengthen_phases
from hybrid_jax.train import read_metrics
from tests.train.conftest import arrays, experiment


def single(made_source, steps, **changes):
    config = experiment(made_source[0], pattern="*-SWA", schedule=("train",))
    config.data.text = made_source[1]
    values = dict(form="as_is", steps=steps, batch_size=1, seq_len=16, schedule="constant", keep_every=1, learning_rate=1e-2)
    config.phases = {"train": {**config.phases.train, **values, **changes}}
    return config


def test_a_finished_phase_of_constant_rate_becomes_the_run_that_was_longer_from_the_start(made_source, tmp_path, capsys):
    want = arrays(load_model(run_experiment(single(made_source, 4), tmp_path / "whole")))
    short = arrays(load_model(run_experiment(single(made_source, 2), tmp_path / "parts")))
    capsys.readouterr()
    got = arrays(load_model(run_experiment(single(made_source, 4), tmp_path / "parts")))
    told = capsys.readouterr().out
    assert all(np.array_equal(want[n], got[n]) for n in want)
    assert "train: lengthened from 2 to 4 steps, on from step 2; the learning rates of the steps done are those of" in told
    assert "resumed at step 2" in told
    aside = tmp_path / "parts" / "before_lengthening" / "train_2_steps"
    for result in (aside / "model", aside / "01_train"):
        assert all(np.array_equal(short[n], x) for n, x in arrays(load_model(result)).items())
    assert [r["step"] for r in read_metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    run_experiment(single(made_source, 4), tmp_path / "parts")  # is this run now
    with pytest.raises(ValueError, match="another config"):
        run_experiment(single(made_source, 2), tmp_path / "parts")


def fake_run(workdir, old, stages=(), checkpoints=()):
    """A run's record, results and checkpoints, without their contents."""
    for name in stages:
        (workdir / "stages" / name).mkdir(parents=True)
    for name, step in checkpoints:
        (workdir / "checkpoints" / name / str(step)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(old))


def config_of(**phases):
    shared = dict(objective="next_token", learning_rate=1.0)
    return {"seed": 0, "phases": {name: {**shared, **values} for name, values in phases.items()}}


def lengthen(workdir, new):
    stages = {name: workdir / "stages" / f"{n:02d}_{name}" for n, name in enumerate(new["phases"], start=1)}
    lengthen_phases(workdir / "config.json", new, stages, lambda a, b: a == b)
    return json.loads((workdir / "config.json").read_text())


@pytest.mark.parametrize(
    "schedule, words",
    [
        (dict(schedule="wsd", decay_steps=4), "the learning rates of the steps done are those of the longer schedule too"),
        (dict(schedule="linear"), "had the learning rates of 10 steps, the last of them 0.5, and the next one has 0.7, so"),
        (dict(schedule="linear", warmup_steps=6), "the learning rates of the steps done are those of the longer schedule too"),
    ],
)
def test_an_unfinished_phase_goes_on_and_says_whether_rates_already_used_would_have_been_others(tmp_path, capsys, schedule, words):
    old, new = (config_of(a=dict(steps=3), b=dict(steps=n, **schedule)) for n in (10, 20))
    fake_run(tmp_path, old, ("01_a",), (("b", 2), ("b", 6)))
    assert lengthen(tmp_path, new) == new
    out = capsys.readouterr().out
    assert "b: lengthened from 10 to 20 steps, on from step 6" in out and words in out


def test_tokens_and_steps_are_one_count(tmp_path):
    old, new = config_of(a=dict(steps=10)), config_of(a=dict(tokens=20 * 8 * 256))
    fake_run(tmp_path, old)
    assert lengthen(tmp_path, new) == new


@pytest.mark.parametrize(
    "new",
    [
        config_of(a=dict(steps=20, clip=2.0), b=dict(steps=5)),
        config_of(a=dict(steps=9), b=dict(steps=6)),
        config_of(a=dict(steps=10), b=dict(steps=5)),
        {**config_of(a=dict(steps=20), b=dict(steps=5)), "seed": 1},
    ],
)
def test_any_other_difference_and_fewer_steps_change_nothing(tmp_path, new):
    old = config_of(a=dict(steps=10), b=dict(steps=5))
    fake_run(tmp_path, old, ("01_a",), (("a", 10),))
    assert lengthen(tmp_path, new) == old and (tmp_path / "stages" / "01_a").exists()


@pytest.mark.parametrize(
    "stages, checkpoints, words",
    [
        (("01_a",), (), "its last checkpoint, which held the optimizer's state, was removed because phase.keep_every is 0"),
        (("01_a",), (("a", 8),), "it is finished, and its last checkpoint"),
        (("01_a", "02_b"), (("a", 10),), "phase 'b' has been trained from its result"),
        (("01_a",), (("a", 10), ("b", 2)), "phase 'b' has been trained from its result"),
    ],
)
def test_a_finished_phase_that_cannot_go_on_is_refused_with_the_reason(tmp_path, stages, checkpoints, words):
    old, new = (config_of(a=dict(steps=n), b=dict(steps=5)) for n in (10, 20))
    fake_run(tmp_path, old, stages, checkpoints)
    with pytest.raises(ValueError, match="phase 'a' cannot be lengthened") as e:
        lengthen(tmp_path, new)
    assert words in str(e.value) and "as the source" in str(e.value)
    assert json.loads((tmp_path / "config.json").read_text()) == old and (tmp_path / "stages" / "01_a").exists()
