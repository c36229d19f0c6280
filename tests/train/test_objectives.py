"""Objectives and what a phase says of them, against torch: weights, temperature, direction; which parameters train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.data.layout import training_batch
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.train.objectives import make_objective
from hybrid_jax.train.phase_layout import PhaseLayout, trained_names
from tests.conftest import tiny_config, tiny_model
from tests.train.conftest import batch_of, phase

torch = pytest.importorskip("torch")
functional = torch.nn.functional


@pytest.fixture(scope="module")
def streams():
    """A fused model, a batch whose tokens weigh unevenly, and both streams' logits as torch's float64."""
    model, batch = tiny_model("*DA-SWA*"), batch_of(rows=2)
    found = model.two_streams(batch["input_ids"], batch["segment_ids"], batch["positions"])
    logits = (torch.tensor(np.asarray(model.head(h), np.float64)).reshape(-1, 61) for h in (found.teacher, found.student))
    return model, batch, *logits


def mean(losses, batch):
    weights = torch.tensor(np.asarray(batch["weights"], np.float64)).reshape(-1)
    return float((losses * weights).sum() / weights.sum())


def next_token(student, batch):
    return mean(
        functional.cross_entropy(student, torch.tensor(np.asarray(batch["targets"], np.int64)).reshape(-1), reduction="none"), batch
    )


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_distillation_is_torch_s_weighed_as_its_options_say(streams, kind):
    model, batch, teacher, student = streams
    options = dict(kind=kind, temperature=2.0, divergence_weight=0.25, next_token_weight=0.5)
    loss, metrics, _ = make_objective("distill", options)(model, batch)
    log_q, log_p = ((x / 2.0).log_softmax(-1) for x in (teacher, student))
    if kind == "reverse":
        log_q, log_p = log_p, log_q
    want = mean(functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1), batch)  # KL(q | p)
    assert float(metrics["divergence"]) == pytest.approx(want, rel=1e-5)
    assert float(metrics["next_token"]) == pytest.approx(next_token(student, batch), rel=1e-5)
    assert float(loss) == pytest.approx(0.25 * 4.0 * want + 0.5 * next_token(student, batch), rel=1e-5)
    assert loss.weight == batch["weights"].sum()


def test_cached_distillation_is_torch_s_weighed_as_its_options_say(streams):
    model, batch, teacher, student = streams
    log_q, ids = teacher.log_softmax(-1).topk(61)
    shape = (*batch["input_ids"].shape, 61)
    cached = {
        "teacher_ids": jnp.asarray(ids.numpy().reshape(shape)),
        "teacher_log_probabilities": jnp.asarray(log_q.numpy().reshape(shape)),
    }
    loss, metrics, _ = make_objective("distill_cached", dict(divergence_weight=0.25, next_token_weight=0.5))(
        model, {**batch, **cached}
    )
    want = mean(
        functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1), batch
    )
    assert float(metrics["divergence"]) == pytest.approx(want, rel=1e-4)
    assert float(loss) == pytest.approx(0.25 * want + 0.5 * next_token(student, batch), rel=1e-4)


def test_only_what_a_pattern_finds_anywhere_in_a_name_trains():
    config = tiny_config("*-SWA-*")
    assert trained_names(config, [r"layers\.1\.swa\.q_", "^norm"]) == {
        "layers.1.swa.q_proj.kernel",
        "layers.1.swa.q_norm.weight",
        "norm.weight",
    }
    assert trained_names(config, ["all"]) == set(split_model(tiny_model("*-SWA-*"))[1])
    layernorms = {f"layers.{i}.{n}_layernorm.weight" for i in range(3) for n in ("input", "post_attention")}
    assert trained_names(config, ["layernorm"]) == layernorms


def test_frozen_matrices_alone_are_rounded_to_the_frozen_dtype():
    model = tiny_model("*-SWA")
    p = phase(trainable=(r"\.swa\.",), frozen_dtype="bfloat16")
    parameters = split_model(model)[1]
    state, frozen, _ = PhaseLayout(model, p).begin(None, parameters)
    assert {n for n, x in frozen.items() if x.dtype == jnp.bfloat16} == {n for n, x in frozen.items() if x.ndim > 1}
    for name, x in {**state.trainable, **frozen}.items():
        want = torch.tensor(np.asarray(parameters[name]))
        if x.dtype == jnp.bfloat16:
            want = want.to(torch.bfloat16).to(torch.float32)
        assert np.array_equal(np.asarray(x.astype(jnp.float32)), want.numpy()), name
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable)) and "norm.weight" in frozen


def test_an_alignment_s_losses_of_tokens_are_those_of_the_rows_by_themselves():
    model = tiny_model("*DA-SWA*")
    ids = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[1, 4:] = 0
    rows = {"input_ids": ids, "segment_ids": segments, "loss_weights": np.ones(ids.shape, np.float32)}
    objective = make_objective("align_all", {})
    loss, _, tokens = objective(model, {n: jnp.asarray(x) for n, x in training_batch(rows).items()})
    losses, weights = (np.asarray(x) for x in tokens)
    assert np.array_equal(weights, segments) and loss.weight == 13
    for row in (0, 1):
        alone = {n: jnp.asarray(x[row : row + 1]) for n, x in training_batch(rows).items()}
        want = float(objective(model, alone).loss)
        assert np.average(losses[row], weights=weights[row]) == pytest.approx(want, rel=1e-5)
    assert np.average(losses, weights=weights) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 8.0])
def test_a_loss_does_not_depend_on_the_scale_of_its_weights(scale):
    model, ids = tiny_model("*"), np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
    given = np.linspace(0.1, 1, 18, dtype=np.float32).reshape(2, 9) * scale
    rows = {"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": given}
    loss = make_objective("next_token", {})(model, {n: jnp.asarray(x) for n, x in training_batch(rows).items()}).loss
    logits = torch.tensor(np.asarray(model(ids), np.float64))[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[:, 1:].reshape(-1).astype(np.int64)), reduction="none")
    assert float(loss) == pytest.approx(np.average(losses.numpy(), weights=given[:, 1:].reshape(-1)), rel=1e-5)
    assert float(loss.weight) == pytest.approx(given[:, 1:].sum(), rel=1e-6)


def test_an_alignment_s_error_may_be_the_norm_of_the_difference_and_its_metrics_stay_mean_squares():
    model, batch = tiny_model("*DA-SWA*"), batch_of(rows=2)
    streams = model.two_streams(batch["input_ids"], batch["segment_ids"], batch["positions"])
    real = np.asarray(batch["segment_ids"] > 0)
    (_, (taught, student)), final = streams.layers, (streams.teacher, streams.student)
    differences = [np.asarray(a - b, np.float64)[real] for a, b in ((taught.hidden, student.hidden), final)]
    half, last = (np.sqrt((d**2).sum(-1)).mean() for d in differences)
    loss, metrics, _ = make_objective("align_decoder", {"error": "norm"})(model, batch)
    assert float(loss) == pytest.approx(half / 2 + last, rel=1e-4)
    assert float(metrics["pre_lm_head_mse"]) == pytest.approx((differences[1] ** 2).mean(), rel=1e-4)
    assert float(metrics["mixer_mse/01"]) == pytest.approx(np.square(taught.mixer - student.mixer)[real].mean(), rel=1e-4)


def test_of_layers_without_an_mlp_the_mixers_are_all_that_residuals_compare():
    """A fused model of attention and windows: each layer adds its mixer's output and nothing else."""
    model, batch = tiny_model("*DA-SWA*", intermediate_size=0, norms="both"), batch_of(rows=2)
    names, parameters = split_model(model)
    assert {n.split(".")[2] for n in parameters if n.startswith("layers.1.")} == {
        "input_layernorm", "post_attention_layernorm", "self_attn", "swa",
    }  # fmt: skip
    hidden, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
    out = model.layers[1].run("swa", hidden, **at)[0]
    assert np.array_equal(out.hidden, hidden + out.mixer) and not np.any(out.mlp)
    mixer, residuals = (make_objective(f"align_{target}", {"error": "norm"}) for target in ("mixer", "residuals"))
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: residuals(join_model(names, p), batch).loss.value))(parameters)
    assert float(loss) == pytest.approx(float(mixer(model, batch).loss), rel=1e-6)
    assert all(np.isfinite(g).all() for g in gradients.values()) and np.any(gradients["layers.1.swa.q_proj.kernel"])


def test_layers_that_read_the_teacher_s_states_are_aligned_one_by_one():
    batch = batch_of(rows=2)
    model = tiny_model("SWA*-SWA*-*DA")
    names, parameters = split_model(model)[0], split_model(model)[1]
    objective = make_objective("align_mixer", {"inputs": "teacher", "pre_lm_head": False})

    def errors(changed):
        found = objective(join_model(names, {**parameters, **changed}), batch)
        assert "pre_lm_head_mse" not in found.metrics
        return float(found.loss), [float(found.metrics[f"mixer_mse/0{n}"]) for n in range(2)]

    loss, mine = errors({})
    assert loss == pytest.approx(sum(mine) / 3, rel=1e-5) and min(mine) > 0
    name = "layers.0.swa.v_proj.kernel"
    other = errors({name: 2 * parameters[name]})[1]
    assert other[0] > 1.5 * mine[0] and other[1] == mine[1]  # the second layer does not see the first one's error
    chained = make_objective("align_mixer", {"pre_lm_head": False})(model, batch)
    assert float(chained.metrics["mixer_mse/00"]) == pytest.approx(mine[0], rel=1e-5)
    assert float(chained.metrics["mixer_mse/01"]) != pytest.approx(mine[1], rel=1e-3)
    grads = jax.grad(lambda p: objective(join_model(names, p), batch).loss.value)(parameters)
    assert all(np.any(grads[n]) for n in (name, "layers.1.swa.q_proj.kernel")) and not np.any(grads["layers.0.mlp.up_proj.kernel"])


def test_layers_that_read_the_teacher_s_states_have_no_final_states_to_compare():
    with pytest.raises(ValueError, match="set pre_lm_head = False"):
        make_objective("align_mixer", {"inputs": "teacher"})
    with pytest.raises(ValueError, match="expected one of student, teacher|one of"):
        make_objective("align_mixer", {"inputs": "both"})
