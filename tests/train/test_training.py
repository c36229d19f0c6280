"""Phases, the optimizer, the loop: what trains, what resumes, what stops."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from hybrid_jax import load_model
from hybrid_jax.data.layout import training_batch
from hybrid_jax.experiment import run_experiment
from hybrid_jax.parameters import marks, select_names, split_model
from hybrid_jax.train import MetricWriter, Phase, Stopped
from hybrid_jax.train.optimizer import learning_rate_schedule, make_optimizer
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.step import make_step
from tests.conftest import tiny_model
from tests.train.conftest import arrays, experiment, losses, model_for, phase, train


def test_training_lowers_the_loss_and_leaves_frozen_parameters_alone(corpus, tmp_path):
    before = model_for(corpus)
    start = arrays(before)
    after = arrays(train(corpus, tmp_path, before, steps=30, trainable=(r"\.gka\.",)))
    assert np.mean(list(losses(tmp_path).values())[-5:]) < losses(tmp_path)[1]
    for name in start:
        assert np.array_equal(start[name], after[name]) == (".gka." not in name), name
    assert all(np.array_equal(start[n], v) for n, v in arrays(before).items()), "the caller's model must stay whole"


def test_frozen_parameters_hold_no_optimizer_state(corpus):
    structure, parameters = split_model(model := model_for(corpus))
    names = select_names(parameters, [r"\.gka\."])
    optimizer = make_optimizer(phase(trainable=(r"\.gka\.",)), marks(model))
    state = optimizer.init({n: parameters[n] for n in names})
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * sum(parameters[n].size for n in names)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_resumes_bit_exactly(corpus, tmp_path, monkeypatch, optimizer):
    whole = arrays(train(corpus, tmp_path / "whole", optimizer=optimizer))
    import hybrid_jax.train.loop as loop

    steps = {"n": 0}
    real = loop.training_batches

    class Interrupting:
        def __init__(self, stream):
            self.stream = stream

        def __next__(self):
            steps["n"] += 1
            if steps["n"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.stream)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(loop, "training_batches", lambda *a, **k: Interrupting(real(*a, **k)))
    with pytest.raises(Stopped, match="step 4 of 6"):
        train(corpus, tmp_path / "parts", optimizer=optimizer)
    monkeypatch.setattr(loop, "training_batches", real)
    parts = arrays(train(corpus, tmp_path / "parts", optimizer=optimizer))
    assert all(np.array_equal(whole[n], parts[n]) for n in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_request_to_stop_during_the_last_step_is_not_lost(corpus, tmp_path, monkeypatch):
    real = MetricWriter.write

    def write(self, name, step, metrics):
        real(self, name, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", write)
    with pytest.raises(Stopped, match="saved at step 2 of 2"):
        train(corpus, tmp_path, steps=2)
    train(corpus, tmp_path, steps=2)  # nothing is left to do


def test_a_pattern_that_matches_nothing_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="'gdn' matches no parameter"):
        train(corpus, tmp_path, trainable=("gdn",))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(objective="mse"), "objective"),
        (dict(steps=0), "steps"),
        (dict(warmup_steps=9), "warmup_steps"),
        (dict(optimizer="sgd"), "'adamw', 'muon'"),
        (dict(objective="align_mixer"), "form = 'fused'"),
        (dict(stepz=1), "unknown key 'stepz'"),
        (dict(schedule="exp"), "'constant', 'cosine', 'linear'"),
    ],
)
def test_bad_phases_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match="phase 'p'") as e:
        Phase.from_config("p", {"objective": "next_token", "steps": 5, **changes})
    assert words in str(e.value)


def test_schedules_warm_up_and_end_where_they_should():
    cosine = learning_rate_schedule(phase(steps=100, warmup_steps=10, learning_rate=1.0, final_fraction=0.1))
    assert np.isclose(cosine(0), 0.1) and np.isclose(cosine(9), 1.0) and np.isclose(cosine(100), 0.1)
    linear = learning_rate_schedule(phase(steps=10, schedule="linear", learning_rate=1.0))
    assert np.isclose(linear(0), 1.0) and np.isclose(linear(5), 0.5) and np.isclose(linear(10), 0.0)


def test_norms_biases_and_decay_parameters_are_not_decayed():
    flags = {name: mark.decay for name, mark in marks(tiny_model("M2-GKA-*")).items()}
    assert not any(flags[n] for n in flags if n.endswith(("norm.weight", "layernorm.weight", "bias", "A_log", ".D")))
    assert flags["layers.0.mamba.in_proj.kernel"] and flags["layers.2.self_attn.q_proj.kernel"]


def test_alignment_moves_the_student_towards_the_teacher():
    from hybrid_jax.priming.fuse import fuse
    from hybrid_jax.priming.initialize import initialize_hybrid

    source = tiny_model("*-*-*")
    fused = fuse(initialize_hybrid(source, "*-GKA-*"), source)
    ids = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
    ones = np.ones_like(ids)
    batch = training_batch({"input_ids": ids, "segment_ids": ones, "loss_weights": ones.astype(np.float32)})
    for objective in ("align_decoder", "align_mixer", "align_residuals", "align_all", "align_none"):
        p = phase(objective=objective, form="fused", steps=25, trainable=(r"\.gka\.",))
        layout = PhaseLayout(fused, p)
        state, frozen, _ = layout.begin(None, split_model(fused)[1])
        step = make_step(layout, p)
        seen = []
        for _ in range(25):
            state, metrics = step(state, frozen, batch)
            seen.append(float(metrics["loss"]))
        assert seen[-1] < 0.7 * seen[0], objective
        assert "mixer_mse/01" in metrics and "mixer_mse/00" not in metrics


def test_an_experiment_makes_every_stage_and_a_second_run_reuses_all(made_source, tmp_path):
    source, text = made_source
    config = experiment(source)
    config.data.text = text
    out = run_experiment(config, tmp_path / "run")
    stages = sorted(p.name for p in (tmp_path / "run" / "stages").iterdir())
    assert stages == ["00_initial", "01_align", "02_train"]
    assert load_model(tmp_path / "run" / "stages" / "01_align").config.pattern == "*DA-GKA*"
    assert load_model(out).config.pattern == "*-GKA"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    assert run_experiment(config, tmp_path / "run") == out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")} == written
    with pytest.raises(ValueError, match="another config"):
        other = experiment(source, seed=1)
        other.data.text = text
        run_experiment(other, tmp_path / "run")


def test_an_experiment_without_phases_is_stage_0(made_source, tmp_path):
    source, text = made_source
    config = experiment(source, schedule=())
    config.data.text = text
    for _ in range(2):
        assert load_model(run_experiment(config, tmp_path / "run")).config.pattern == "*-GKA"
    shutil.rmtree(tmp_path / "run" / "model")
    assert load_model(run_experiment(config, tmp_path / "run")).config.pattern == "*-GKA"


def test_an_experiment_can_select_its_layers(made_source, tmp_path):
    source, text = made_source
    config = experiment(source, pattern="", select=dict(mixer="GKA", fraction=0.5, window=2, rows=2, seq_len=128))
    config.data.text = text
    out = run_experiment(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert load_model(out).config.pattern == record["pattern"]
    assert sorted(record["pattern"].split("-")) == ["*", "GKA"] and len(record["scores"]) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pattern="*-GKB"), "layer 1"),
        (dict(schedule=("align", "sft")), "'sft'"),
        (dict(sourc="x"), "unknown key 'sourc'"),
        (dict(pattern="*-*-*"), "3 symbols"),
        (dict(source="/nowhere"), "no model directory at /nowhere"),
        (dict(mixers={"gka_config": {"iterations": 3}}), "iterations"),
        (dict(pattern="*-GDN"), "phase 'align': the pattern"),
        (dict(pattern="*-GDN"), "the model has embed_tokens.embedding, layers.N.gdn, "),
        (dict(select={"mixr": "GKA"}), "config.select has the unknown key 'mixr' (did you mean 'mixer'?)"),
        (dict(select={"rows": 0}, pattern=""), "select.rows must be an integer at least 1, got 0"),
        (dict(select={"seq_len": 64}, pattern=""), "select.seq_len must be an integer at least 66, got 64"),
        (dict(data={"text": "/nowhere", "mix": {}}), "no text at '/nowhere'"),
        (dict(data={"text": "", "mix": {}, "source": {}}), "config.data has the unknown key 'source'"),
        (dict(data={"text": "", "mix": {}, "sources": {"web": {"path": "stdlib", "packing": "best"}}}), "web: packing 'best'"),
        (dict(data={"text": "", "mix": {}, "sources": {"retrieval": {"path": "stdlib"}}}), "a synthetic task's"),
    ],
)
def test_a_bad_experiment_is_refused_before_anything_is_written(made_source, tmp_path, changes, words):
    source, text = made_source
    config = experiment(source, **changes)
    config.data.text = config.data.text or text
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        run_experiment(config, tmp_path / "run")
    assert words in str(e.value)
    assert not (tmp_path / "run").exists()
