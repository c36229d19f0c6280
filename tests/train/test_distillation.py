"""Distillation: a student nears its teacher, which stays what it was whatever trains; cached answers do as well."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.commands.main import main
from hybrid_jax.data.pipeline import training_batches
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.parameters import split_model
from hybrid_jax.priming.fuse import fuse
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train import Phase, read_metrics
from hybrid_jax.train.cache import cache_teacher, teacher_fingerprint
from hybrid_jax.train.objectives import OBJECTIVES, distill
from hybrid_jax.train.phase_layout import TEACHER, PhaseLayout
from hybrid_jax.train.step import make_step
from tests.conftest import relative_error, tiny_model
from tests.train.conftest import batch_of, phase


def fused(pattern="*-SWA-*"):
    source = tiny_model("*-*-*")
    return fuse(initialize_hybrid(source, pattern), source)


def textbook(model, batch, kind="forward", temperature=1.0):
    streams = model.two_streams(batch["input_ids"], batch["segment_ids"], batch["positions"])
    log_q, log_p = (jax.nn.log_softmax(model.head(h) / temperature) for h in (streams.teacher, streams.student))
    if kind == "reverse":
        log_p, log_q = log_q, log_p
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    return jnp.sum(kl * batch["weights"]) / jnp.sum(batch["weights"])


@pytest.mark.parametrize("kind, temperature", [("forward", 1.0), ("reverse", 2.0)])
def test_the_loss_is_the_textbook_s(kind, temperature):
    model, batch = fused(), batch_of()
    loss, metrics, _ = distill(model, batch, kind=kind, temperature=temperature, next_token_weight=0.5)
    want = textbook(model, batch, kind, temperature)
    assert relative_error(metrics["divergence"].value, want) < 1e-5
    next_token = OBJECTIVES["next_token"](model, batch).loss.value
    assert relative_error(loss.value, temperature**2 * want + 0.5 * next_token) < 1e-5


@pytest.mark.parametrize("trainable", [(r"\.swa\.",), ("all",)])
def test_the_student_nears_a_teacher_that_stays(trainable):
    model, batch = fused(), batch_of()
    p = phase(objective="distill", form="fused", trainable=trainable, learning_rate=3e-3, options={"kind": "forward"})
    layout = PhaseLayout(model, p)
    state, frozen, _ = layout.begin(None, split_model(model)[1])
    copies = {n for n in frozen if n.startswith(TEACHER)}
    assert bool(copies) == (trainable == ("all",)) and not any(".swa." in n for n in copies)

    def teacher(state):
        own, other = layout.models(state.trainable, frozen)
        return (other or own).hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"], stream="teacher")[0]

    before, step, seen = np.asarray(teacher(state)), make_step(layout, p), []
    for _ in range(25):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.5 * seen[0]
    assert relative_error(teacher(state), before) < 1e-6
    assert set(layout.parameters(state, frozen)) == set(split_model(model)[1])


def test_options_that_an_objective_has_not_are_refused():
    for changes, words in (
        (dict(objective="distill", form="fused", options={"heat": 1}), "no option 'heat'; it has kind, temperature"),
        (dict(objective="distill", form="fused", options={"kind": "both"}), "options.kind must be one of 'forward', 'reverse'"),
        (dict(objective="next_token", options={"kind": "forward"}), "it has none"),
        (dict(objective="distill"), "form = 'fused'"),
        (dict(objective="distill_cached"), "'distill_cached' needs a phase.teacher_cache"),
        (dict(teacher_cache="here"), "'next_token' does not read a phase.teacher_cache"),
        (dict(objective="distill", form="fused", options={"temperature": 0}), "options.temperature must be a number above 0"),
        (dict(objective="distill", form="fused", options={"divergence_weight": "1"}), "options.divergence_weight must be a number"),
        (dict(objective="align_all", form="fused", options={"pre_lm_head": 1}), "options.pre_lm_head must be true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            phase(**changes)


ROWS = dict(batch_size=2, length=128, seed=0, answer_weight=1.0)


def test_a_cache_holds_what_a_teacher_thinks_of_each_row(corpus, tmp_path):
    k = corpus.tokenizer.get_vocab_size()
    teacher = tiny_model("*-*", vocab_size=k)
    student = dict(rope_theta=1e6, max_position_embeddings=512)  # a phase's RoPE is not its teacher's
    rows = dict(steps=3, batch_size=2, seq_len=128)
    p = Phase.from_config("p", dict(objective="next_token", compute_dtype="float32", **rows, **student))
    cache_teacher(teacher, p, corpus, {"text": 1.0}, seed=0, out=tmp_path / "cache", k=k)
    stream = training_batches(corpus, {"text": 1.0}, **ROWS, teacher_cache=str(tmp_path / "cache"))
    plain = training_batches(corpus, {"text": 1.0}, **ROWS)
    for _ in range(3):
        batch, want = next(stream), next(plain)
        assert np.array_equal(batch["input_ids"], want["input_ids"])
        log_p = jax.nn.log_softmax(teacher(want["input_ids"], want["segment_ids"]))
        got = np.take_along_axis(np.asarray(log_p), batch["teacher_ids"], axis=-1)
        assert np.abs(got - batch["teacher_log_probabilities"]).max() < 1e-2
        assert (np.diff(batch["teacher_log_probabilities"], axis=-1) <= 0).all()
    made = TeacherCache(tmp_path / "cache", mix={"text": 1.0}, **ROWS)
    made.check(3)
    with pytest.raises(FileNotFoundError, match="has no step 3 of 5"):
        made.check(5)
    half = training_batches(corpus, {"text": 1.0}, **ROWS, teacher_cache=str(tmp_path / "cache"), rows=[1])
    assert next(half)["teacher_ids"].shape == (1, 128, k)


def test_a_cache_of_other_rows_is_refused(tmp_path):
    TeacherCache(tmp_path / "c", 4, mix={"text": 1}, **ROWS)
    with pytest.raises(ValueError, match="made with seed = 0, this phase has 1"):
        TeacherCache(tmp_path / "c", mix={"text": 1}, **{**ROWS, "seed": 1})
    with pytest.raises(FileNotFoundError, match="cache-teacher"):
        TeacherCache(tmp_path / "d", mix={"text": 1}, **ROWS)


def test_a_cache_is_not_continued_with_another_teacher(corpus, tmp_path):
    k = corpus.tokenizer.get_vocab_size()
    p = Phase.from_config("p", dict(objective="next_token", steps=1, batch_size=2, seq_len=128))
    made_of = {**corpus.identity({"text": 1.0}), "teacher": teacher_fingerprint(tiny_model("*", vocab_size=k))}
    TeacherCache(tmp_path / "cache", 4, mix={"text": 1.0}, made_of=made_of, **ROWS)
    with pytest.raises(ValueError, match="was made with teacher = .*, this teacher is"):
        cache_teacher(tiny_model("*", vocab_size=k, seed=1), p, corpus, {"text": 1.0}, seed=0, out=tmp_path / "cache", k=4)


def test_rows_that_cannot_be_made_leave_no_cache_for_others(corpus, tmp_path):
    model, mix = tiny_model("*", vocab_size=corpus.tokenizer.get_vocab_size()), {"induction": 1.0}
    p = Phase.from_config("p", dict(objective="next_token", steps=1, batch_size=2, seq_len=8))
    with pytest.raises(ValueError, match="induction"):
        cache_teacher(model, p, corpus, mix, seed=0, out=tmp_path / "cache", k=4)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_is_known_by_every_weight_and_its_configuration():
    def changed(change):
        model = tiny_model("*")
        change(model)
        return teacher_fingerprint(model)

    def one_bit(model):
        kernel = model.embed_tokens.embedding
        kernel[...] = kernel[...].at[3, 2].set(jnp.nextafter(kernel[3, 2], 9.0))

    def two_rows_swapped(model):
        kernel = model.embed_tokens.embedding
        kernel[...] = kernel[...].at[jnp.array([3, 4])].set(kernel[jnp.array([4, 3])])

    def epsilon(model):
        model.config = dataclasses.replace(model.config, rms_norm_eps=1e-5)

    found = [changed(c) for c in (lambda model: None, one_bit, two_rows_swapped, epsilon)]
    assert len(set(found)) == 4 and changed(lambda model: None) == found[0]


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    rows = dict(steps=2, batch_size=2, seq_len=32, learning_rate=1e-3, log_every=1)
    weights = dict(divergence_weight=0.25, next_token_weight=0.5)
    kd = dict(objective="distill_cached", teacher_cache="CACHE", options=weights, **rows)
    return ConfigDict(dict(source="SOURCE", pattern="*-SWA", schedule=("kd",), phases=dict(kd=kd), seed=0,
                           data=dict(text="TEXT", mix=dict(text=1.0))))
"""


def test_a_run_distils_from_what_the_command_cached(made_source, tmp_path, capsys):
    source, text = made_source
    path, cache = tmp_path / "config.py", tmp_path / "cache"
    path.write_text(CONFIG.replace("CACHE", str(cache)).replace("SOURCE", str(source)).replace("TEXT", text))
    config = f"--config={path}"
    assert main(["prime", config, f"--workdir={tmp_path / 'run'}"]) == 1
    assert "hybrid-jax cache-teacher" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["cache-teacher", config, "--phase", "kd", "--k", "8"]) == 0
    written = {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")}
    assert main(["cache-teacher", config, "--phase", "kd", "--k", "8"]) == 0
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")} == written and len(written) == 4
    assert main(["prime", config, f"--workdir={tmp_path / 'run'}"]) == 0
    last = read_metrics(tmp_path / "run")[-1]
    assert last["loss"] == pytest.approx(0.25 * last["divergence"] + 0.5 * last["next_token"], rel=1e-5)
    assert main(["cache-teacher", config, "--phase", "other"]) == 1
    assert "schedule has kd" in capsys.readouterr().err


def test_a_cache_that_ends_before_a_phase_in_epochs_is_refused_by_name(made_source, tmp_path, capsys):
    source, text = made_source
    path, cache = tmp_path / "config.py", tmp_path / "cache"
    in_epochs = CONFIG.replace("steps=2,", "epochs=0.1, mix=dict(text=1.0),")
    path.write_text(in_epochs.replace("CACHE", str(cache)).replace("SOURCE", str(source)).replace("TEXT", text))
    assert main(["cache-teacher", f"--config={path}", "--phase", "kd", "--k", "4"]) == 0
    *_, last = sorted(cache.glob("step-*"))
    shutil.rmtree(last)
    assert main(["prime", f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert f"has no step {int(last.name.removeprefix('step-'))} of" in capsys.readouterr().err
