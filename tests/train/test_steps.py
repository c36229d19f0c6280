"""Steps: parts of a batch add up to the whole, bad steps change nothing and are explained, schedules, what is measured."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.parameters import split_model
from hybrid_jax.priming.fuse import fuse
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train import loop as loop_module
from hybrid_jax.train import read_metrics
from hybrid_jax.train.diagnose import first_bad
from hybrid_jax.train.metrics import MetricWriter, gradient_norms
from hybrid_jax.train.optimizer import learning_rate_schedule
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.step import make_step
from tests.conftest import relative_error, tiny_model
from tests.train.conftest import arrays, batch_of, losses, model_for, one_step, phase, train


@pytest.mark.parametrize("objective", ["next_token", "align_all"])
def test_parts_of_a_batch_add_up_to_the_whole_however_they_weigh(objective):
    model = tiny_model("*-SWA*" if objective == "align_all" else "*-SWA")
    if objective == "align_all":
        model = tiny_model("*DA-SWA*")
    changes = dict(objective=objective, form="fused" if objective == "align_all" else "as_is", batch_size=4, learning_rate=1e-3)
    _, whole, one = one_step(model, batch_of(), **changes)
    _, parts, two = one_step(model, batch_of(), accumulate=2, **changes)
    for name in one:
        assert relative_error(two[name], one[name]) < 1e-5, name
    for name, value in whole.trainable.items():
        assert relative_error(parts.trainable[name], value) < 1e-5, name
    with pytest.raises(ValueError, match="accumulate 3 does not divide phase.batch_size 4"):
        phase(batch_size=4, accumulate=3)


def test_a_bad_step_changes_nothing_but_the_count():
    model, batch = tiny_model("*-SWA"), batch_of()
    batch["weights"] = batch["weights"] * np.nan
    before, after, metrics = one_step(model, batch)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert after.health.skipped == 1 and after.health.steps == 0
    for old, new in zip(jax.tree.leaves(before[:2]), jax.tree.leaves(after[:2]), strict=True):
        assert np.array_equal(old, new)


def test_a_spike_is_skipped_once_the_mean_is_trusted():
    p = phase(spike=3.0)
    model = tiny_model("*-SWA")
    layout = PhaseLayout(model, p)
    state, frozen, _ = layout.begin(None, split_model(model)[1])
    step, batch = make_step(layout, p), batch_of()
    loss, norm = (float(one_step(model, batch)[2][n]) for n in ("loss", "grad_norm"))
    for steps, loss_then, norm_then, skipped in (
        (5, loss, norm / 10, 0),
        (50, loss, norm / 10, 1),
        (50, loss / 10, norm, 1),
        (50, 0.9 * loss, 0.9 * norm, 0),
    ):
        means = dict(mean_loss=jnp.float32(loss_then), mean_norm=jnp.float32(norm_then))
        known = state.health._replace(steps=jnp.int32(steps), **means)
        copy = jax.tree.map(jnp.copy, state._replace(health=known))
        after, metrics = step(copy, frozen, batch)
        assert metrics["skipped"] == skipped
        assert (after.health.mean_norm == known.mean_norm) == bool(skipped)


def test_bad_steps_in_a_row_end_the_phase_and_name_what_went_bad(corpus, tmp_path, monkeypatch):
    model = model_for(corpus)
    model.layers[1].mlp.up_proj.kernel[...] = model.layers[1].mlp.up_proj.kernel[...] * jnp.nan
    with pytest.raises(
        FloatingPointError, match="2 steps in a row were bad, the last is step 2 .*layers.1.mlp.up_proj.kernel is not finite"
    ):
        train(corpus, tmp_path, model, bad_steps=2)


def test_the_first_layer_that_overflows_is_named():
    model = tiny_model("*-SWA-*")
    model.layers[1].mlp.down_proj.kernel[...] = model.layers[1].mlp.down_proj.kernel[...] * 1e38
    model.layers[1].mlp.up_proj.kernel[...] = model.layers[1].mlp.up_proj.kernel[...] * 1e38
    batch = {n: jnp.asarray(x) for n, x in batch_of().items()}
    assert first_bad(model, batch).startswith("layer 1 (SWA) is the first whose output is not finite: its mlp")
    assert "loss" in first_bad(tiny_model("*"), batch)


def test_a_teacher_that_overflows_is_named_and_the_student_s_own_copy_of_it_is_not_looked_at():
    source = tiny_model("*-*")
    model = fuse(initialize_hybrid(source, "*-SWA"), source)
    model.layers[1].self_attn.v_proj.kernel[...] = model.layers[1].self_attn.v_proj.kernel[...] * jnp.nan
    teacher = tiny_model("*-*")
    teacher.layers[0].mlp.down_proj.kernel[...] = teacher.layers[0].mlp.down_proj.kernel[...] * 1e38
    teacher.layers[0].mlp.up_proj.kernel[...] = teacher.layers[0].mlp.up_proj.kernel[...] * 1e38
    batch = {n: jnp.asarray(x) for n, x in batch_of().items()}
    layout = PhaseLayout(model, phase(objective="align_all", form="fused", trainable=("swa",)), teacher)
    state, frozen, _ = layout.begin(None, *(split_model(m)[1] for m in (model, teacher)))
    want = "layer 0 (*) is the first whose output of the teacher is not finite: its mlp"
    assert first_bad(model, batch, layout.source(state, frozen)) == want
    own = layout.source(state, frozen)
    assert all(np.array_equal(x, split_model(own)[1][n]) for n, x in split_model(teacher)[1].items())
    assert "loss" in first_bad(model, batch), "an objective without a teacher does not read it"
    assert PhaseLayout(model, phase(objective="next_token")).source(state, frozen) is None


def test_skipped_steps_are_told_and_the_run_goes_on(corpus, tmp_path, monkeypatch):
    real = loop_module.training_batch

    def poisoned(rows, seq_devices, calls=[]):  # noqa: B006
        batch = real(rows, seq_devices)
        calls.append(1)
        return {**batch, "weights": batch["weights"] * (np.nan if len(calls) == 3 else 1)}

    monkeypatch.setattr(loop_module, "training_batch", poisoned)
    train(corpus, tmp_path)
    rows = {r["step"]: r for r in read_metrics(tmp_path)}
    assert [rows[s]["skipped"] for s in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert np.isfinite(rows[6]["loss"])


def test_schedules_have_their_shapes():
    def at(**changes):
        p = phase(learning_rate=1.0, **changes)
        return [round(float(learning_rate_schedule(p)(i)), 3) for i in range(p.steps)]

    assert at(schedule="wsd", steps=8, warmup_steps=2, decay_steps=4) == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert at(schedule="linear", steps=4) == [1, 0.75, 0.5, 0.25]
    assert at(schedule="constant", steps=3, warmup_steps=2) == [0.5, 1, 1]
    with pytest.raises(ValueError, match="decay_steps"):
        phase(schedule="wsd")


def test_a_phase_counts_in_steps_or_in_tokens():
    assert phase(steps=0, tokens=1000).steps == 31  # of 32 tokens
    for changes in (dict(steps=0), dict(steps=3, tokens=100)):
        with pytest.raises(ValueError, match="one of steps, tokens and epochs"):
            phase(**changes)


def test_a_phase_in_epochs_is_checked_before_its_steps_are_known():
    unfused, parts = dict(objective="align_all"), dict(accumulate=3)
    for changes, words in ((dict(batch_size=0), "batch_size"), (unfused, "form = 'fused'"), (parts, "accumulate 3")):
        with pytest.raises(ValueError, match=words):
            phase(**{**dict(steps=0, epochs=1.0, mix={"text": 1.0}, batch_size=4), **changes})
    with pytest.raises(ValueError, match="batch_size"):
        phase(steps=0, tokens=100, batch_size=0)


def test_rope_and_context_of_a_phase_stay_with_the_model(corpus, tmp_path):
    model = model_for(corpus)
    after = train(corpus, tmp_path, model, steps=1, rope_theta=5e6, max_position_embeddings=512, learning_rate=0.0)
    assert after.config.rope.theta == 5e6 and after.config.max_position_embeddings == 512
    assert model.config.rope.theta == 1e4
    changed = dataclasses.replace(model.config, rope=after.config.rope)
    assert changed.rope == after.config.rope
    ids = np.arange(3, 13)[None]
    assert relative_error(after(ids), model(ids)) > 1e-3


def test_gradient_norms_come_by_group(corpus, tmp_path):
    names = (
        "embed_tokens.embedding",
        "layers.0.self_attn.q_proj.kernel",
        "layers.1.gka.k_proj.kernel",
        "layers.0.mlp.up_proj.kernel",
    )
    found = gradient_norms({n: jnp.full(4, float(i)) for i, n in enumerate((*names, "layers.0.input_layernorm.weight"))})
    assert {n: float(x) for n, x in found.items() if "/" in n} == {
        "grad_norm/embedding": 0,
        "grad_norm/attention": 2,
        "grad_norm/mixer": 4,
        "grad_norm/mlp": 6,
        "grad_norm/norm": 8,
    }
    train(corpus, tmp_path)
    last = read_metrics(tmp_path)[-1]
    assert {"loss", "learning_rate", "tokens_per_second", "data_wait", "skipped", "grad_norm", "grad_norm/mixer"} <= set(last)


def test_the_share_of_the_peak_is_measured_where_the_peak_is_known(corpus, tmp_path, monkeypatch):
    from hybrid_jax import hardware
    from hybrid_jax.train import meter

    monkeypatch.setattr(meter, "accelerator_of", lambda kind: hardware.TPUS["v5p"])
    found = {}
    for remat in ("none", "full"):
        train(corpus, tmp_path / remat, remat=remat)
        row = read_metrics(tmp_path / remat)[-1]
        found[remat] = row["mfu"] * hardware.TPUS["v5p"].flops / row["tokens_per_second"]
    assert found["full"] == pytest.approx(found["none"]) and found["none"] > 6 * 20_000
    assert hardware.accelerator_of("TPU v5 lite") == hardware.TPUS["v5e"] and hardware.accelerator_of("cpu") is None
    assert hardware.accelerator_of("NVIDIA H100 80GB HBM3") == hardware.GPUS["h100"]


def test_a_torn_line_of_a_killed_run_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"phase": "p", "step": 1, "loss": 2.0}) + '\n{"phase": "p", "st')
    writer = MetricWriter(tmp_path)
    writer.write("p", 2, {"loss": 3.0})
    writer.write("p", 2, {"loss": 1.0})  # by a run that was resumed
    writer.close()
    assert losses(tmp_path) == {1: 2.0, 2: 1.0}


def test_chosen_steps_are_traced(corpus, tmp_path):
    writer = MetricWriter(tmp_path)
    loop_module.train_phase(
        model_for(corpus),
        "p",
        phase(),
        corpus,
        {"text": 1.0},
        seed=0,
        directory=tmp_path / "checkpoints" / "p",
        writer=writer,
        profile=(3, 4),
    )
    writer.close()
    assert list((tmp_path / "profile" / "p").rglob("*.xplane.pb"))


def test_arrays_of_the_caller_stay(corpus, tmp_path):
    model = model_for(corpus)
    start = arrays(model)
    train(corpus, tmp_path, model, optimizer="muon")
    assert all(np.array_equal(start[n], v) for n, v in arrays(model).items())
