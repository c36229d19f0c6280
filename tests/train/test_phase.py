"""A phase's values: refused by name if nobody can mean them, counted in steps, and obeyed."""

import collections
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import load_model
from hybrid_jax.config import SWAConfig
from hybrid_jax.data import training_batches
from hybrid_jax.experiment import run_experiment
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.train import Phase, read_metrics
from hybrid_jax.train.loop import apply_phase_settings
from tests.conftest import relative_error, tiny_model
from tests.train.conftest import experiment, phase

GIVEN = {"objective": "next_token", "steps": 5}


@pytest.mark.parametrize(
    "name, values",
    [
        *((n, (-1e-9, math.nan, math.inf, "1e-4", True)) for n in ("learning_rate", "weight_decay", "clip", "answer_weight")),
        *((n, (-0.1, 1.0, math.nan)) for n in ("beta1", "beta2")),
        *((n, (-0.1, 1.1)) for n in ("final_fraction", "warmup_fraction")),
        ("spike", (-1.0, 0.5, 1.0, math.nan)),
        ("rope_theta", (-1e4, math.nan)),
        ("max_position_embeddings", (-1, 2.5)),
        *((n, (0, -1, 2.0, True)) for n in ("batch_size", "seq_len", "accumulate", "bad_steps", "log_every", "keep")),
        *((n, (-1, 0.5)) for n in ("steps", "warmup_steps", "decay_steps", "keep_every")),
        ("checkpoint_every", (0, "200")),
        ("mix", ({"text": -1.0}, {"text": math.nan}, {"text": 0.0})),
        ("trainable", ("all", ("(",), ())),
        ("schedule", (None, "Cosine")),
        ("remat", (False,)),
    ],
)
def test_a_value_nobody_can_mean_is_refused_with_the_phase_s_and_its_own_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^phase 'sft': phase.{name}"):
            Phase.from_config("sft", {**GIVEN, name: value})


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(decay_steps=2), "decay_steps is 2, but the schedule 'cosine' does not read it"),
        (dict(schedule="constant", final_fraction=0.1), "final_fraction is 0.1, but the schedule 'constant'"),
        (dict(objective="align_none", form="fused", options={"pre_lm_head": False}), "with pre_lm_head = False is 0 everywhere"),
        (dict(objective="distill", form="fused", options={"divergence_weight": 0.0}), "is 0 everywhere, so nothing would train"),
    ],
)
def test_an_option_that_would_be_ignored_or_leave_nothing_to_learn_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        phase(**values)
    phase(objective="distill", form="fused", options={"divergence_weight": 0.0, "next_token_weight": 1.0})
    phase(objective="align_mixer", form="fused", options={"pre_lm_head": False})


def test_values_at_the_edge_are_taken():
    edges = dict(learning_rate=0, beta1=0.0, weight_decay=0.0, clip=0, spike=1.5, final_fraction=1.0, keep_every=0, bad_steps=1)
    found = Phase.from_config("sft", {**GIVEN, **edges, "mix": {"text": 1, "retrieval": 0}, "trainable": ["norm"]})
    assert found.trainable == ("norm",) and found.clip == 0


def test_tokens_and_epochs_are_counted_in_steps():
    rows = dict(batch_size=4, seq_len=8)
    assert [phase(steps=0, tokens=n, **rows).steps for n in (1, 47, 49, 320)] == [1, 1, 2, 10]
    assert phase(steps=0, tokens=640, warmup_fraction=0.12, **rows).warmup_steps == 3  # 2.4 of 20, rounded up
    of_epochs = phase(steps=0, epochs=2.5, mix={"text": 1.0}, warmup_fraction=0.5, **rows)
    assert [of_epochs.with_rows(n).steps for n in (1, 10, 11, 13)] == [1, 6, 7, 8]
    assert of_epochs.with_rows(10).warmup_steps == 3 and of_epochs.with_rows(10).epochs == 0

    class Rows:
        def rows(self, source, length, seed):
            return range({("text", 8): 16}[source, length])

    assert of_epochs.in_steps(Rows(), {"text": 1.0}, seed=0).steps == 10


def test_rows_are_described_as_the_phase_has_them():
    p = phase(batch_size=3, seq_len=24, answer_weight=0.25)
    described = dict(mix={"text": 1.0}, batch_size=3, length=24, seed=7, answer_weight=0.25)
    assert p.described_rows({"text": 1.0}, 7) == described
    assert (p.tokens_per_step, phase(batch_size=6, accumulate=3).rows_at_a_time) == (72, 2)


def test_activations_have_the_phase_s_dtype_and_parameters_keep_theirs():
    ids, found = np.arange(3, 13)[None], {}
    for dtype in ("float32", "bfloat16"):
        model = apply_phase_settings(tiny_model("*"), phase(compute_dtype=dtype))
        hidden, _ = model.hidden_states(ids, np.ones_like(ids), np.arange(10)[None])
        assert hidden.dtype == jnp.dtype(dtype) and model.embed_tokens.embedding[...].dtype == jnp.float32
        found[dtype] = hidden.astype(jnp.float32)
    assert 1e-4 < relative_error(found["bfloat16"], found["float32"]) < 5e-2


def test_a_phase_s_own_mix_comes_before_the_experiment_s(made_source):
    config = experiment(made_source[0])
    config.data.text = made_source[1]
    config.phases.align.mix = {"induction": 2.0}
    read = Experiment.from_config(config)
    (_, align), (_, train) = read.phases
    assert read.mix_of(align) == {"induction": 2.0} and read.mix_of(train) == {"text": 1.0}


def test_mixers_and_each_phase_s_mix_are_what_a_run_has(made_source, tmp_path):
    source, text = made_source
    sources = {"more": {"path": text}}
    config = experiment(source, pattern="*-SWA", mixers={"swa_config": {"window_size": 3}}, schedule=("train",))
    config.data = {"text": text, "sources": sources, "mix": {"more": 1.0}}
    config.phases.train.update(dict(mix={"text": 1.0}, steps=1, batch_size=1, seq_len=16, form="as_is"))
    out = run_experiment(config, tmp_path / "run")
    assert load_model(out).config.options(SWAConfig).window_size == 3
    (row,) = read_metrics(tmp_path / "run")
    assert row["loss/text"] == pytest.approx(row["loss"]) and "loss/more" not in row


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(schedule=("align", "train", "align")), "config.schedule names 'align' twice"),
        (dict(mix={"text": 1.0, "webb": 0.1}), "phase 'align' mixes the unknown data source 'webb'; known: text, retrieval"),
        (dict(mix={"text": 1.0, "retrieval": -0.1}), "phase 'align': data.mix needs"),
        (dict(mix={}), "phase 'align': data.mix needs at least one positive share"),
    ],
)
def test_what_would_fail_or_mislead_later_is_refused_before_any_work(made_source, tmp_path, changes, words):
    mix = changes.pop("mix", {"text": 1.0})
    config = experiment(made_source[0], **changes)
    config.data = {"text": made_source[1], "mix": mix}
    with pytest.raises(ValueError) as e:
        run_experiment(config, tmp_path / "run")
    assert words in str(e.value) and not (tmp_path / "run").exists()


def test_a_source_with_fewer_rows_than_the_phase_takes_is_named_with_how_often_it_is_seen(corpus, capsys):
    mix, have = {"text": 3.0, "retrieval": 1.0}, len(corpus.rows("text", 128, 0))
    steps = -(-10 * have // 12)  # three of a step's four rows are text, each of which is seen two and a half times
    capsys.readouterr()
    rows = dict(batch_size=4, length=128, seed=0)
    stream = training_batches(corpus, mix, **rows, steps=steps)
    said = capsys.readouterr().out.splitlines()
    seen = collections.Counter()
    for _ in range(steps):
        batch = next(stream)
        seen.update(x.tobytes() for x in batch["input_ids"][batch["source"] == 1])
    times = sum(seen.values()) / have
    assert times == pytest.approx(2.5, abs=0.1) and len(seen) <= have < sum(seen.values())
    note = f"text: {have:,} rows for the {3 * steps:,} that this phase takes, so each is seen {times:.1f} times"
    assert [line for line in said if "seen" in line] == [note]
    training_batches(corpus, mix, **rows, steps=have // 3)
    assert "seen" not in capsys.readouterr().out, "each row at most once"


def test_what_a_source_s_config_says_of_training_and_is_not_done_is_said(made_source, tmp_path, capsys):
    source = shutil.copytree(made_source[0], tmp_path / "source")
    given = {"output_router_logits": True, "resid_pdrop": 0.1, "embd_pdrop": 0.0}
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | given))
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="text"):  # it comes later
        run_experiment(experiment(source, data={"text": str(tmp_path / "text.txt"), "mix": {"text": 1.0}}), tmp_path / "run")
    said = "not applied in training, though config.json has them: resid_pdrop = 0.1, output_router_logits = True"
    assert said in capsys.readouterr().out
