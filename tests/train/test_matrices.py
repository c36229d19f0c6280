"""MOHAWK's first stage: the student's mixing matrices learn to be the teacher's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import SWAConfig
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.train.objectives import make_objective
from tests.conftest import tiny_model
from tests.train.conftest import batch_of

BATCH = batch_of(rows=2)
AT = dict(positions=jnp.asarray(BATCH["positions"]), segment_ids=jnp.asarray(BATCH["segment_ids"]))


def objective(**options):
    return make_objective("align_matrices", options)


def test_the_loss_is_the_distance_of_the_matrices_on_the_teacher_s_states():
    model = tiny_model("*DA-GDN*-M2[1]*")
    loss, metrics, tokens = objective(rows=5)(model, BATCH)
    hidden, want = model.inputs(BATCH["input_ids"], BATCH["segment_ids"], BATCH["positions"])[0], []
    real = np.asarray(BATCH["segment_ids"] > 0)[:, None, :, None]
    for layer in model.layers:
        x = layer.mixer_input(hidden)
        a = np.asarray(layer.mixer("attention").mixing(x, **AT).matrix(), np.float64)
        m = np.asarray(layer.mixer(layer.spec.kind).mixing(x, **AT).matrix(), np.float64)[:, :4]
        want.append(np.sqrt((np.square(m - a) * real).sum((2, 3))).mean())
        hidden = layer.run("attention", hidden, **AT)[0].hidden
    assert want[0] == 0 and set(metrics) == {"matrix_error/01", "matrix_error/02"} and tokens is None
    assert [float(metrics[f"matrix_error/0{i}"]) for i in (1, 2)] == pytest.approx(want[1:], rel=1e-4)
    assert float(loss) == pytest.approx(sum(want), rel=1e-4) and float(loss.weight) == 2


def test_a_student_with_the_teacher_s_matrices_has_no_loss_and_moves_nothing():
    model = tiny_model("SWA*", swa=SWAConfig(1000))
    structure, parameters = split_model(model)
    same = {n: parameters[n.replace(".swa.", ".self_attn.")] for n in parameters}

    def loss(parameters):
        return objective()(join_model(structure, parameters), BATCH).loss.value

    value, gradients = jax.value_and_grad(loss)(same)
    assert value < 1e-4 and all(np.all(np.isfinite(g)) for g in gradients.values())


def test_padding_counts_for_nothing():
    model, padded = tiny_model("GDN*"), {n: np.array(x) for n, x in BATCH.items()}
    padded["segment_ids"][:, -4:] = 0
    changed = {**padded, "input_ids": np.where(padded["segment_ids"] > 0, padded["input_ids"], 7)}
    assert float(objective()(model, padded).loss) == pytest.approx(float(objective()(model, changed).loss), rel=1e-6)
    nothing = {**padded, "segment_ids": np.zeros_like(padded["segment_ids"])}
    assert float(objective()(model, nothing).loss) == 0


def test_what_makes_the_matrices_learns_and_nothing_else():
    model = tiny_model("*DA-DM2*")
    structure, parameters = split_model(model)

    def loss(parameters):
        return objective()(join_model(structure, parameters), BATCH).loss.value

    step = jax.jit(jax.value_and_grad(loss))
    first, gradients = step(parameters)
    moved = {n for n, g in gradients.items() if np.any(g)}
    own = "layers.1.discrete_mamba2."
    assert moved == {own + n for n in ("in_proj.kernel", "conv1d.kernel", "conv1d.bias", "D")} | {"layers.1.input_layernorm.weight"}
    for _ in range(20):
        parameters = {n: p - 0.02 * gradients[n] for n, p in parameters.items()}
        value, gradients = step(parameters)
    assert value < 0.9 * first


def test_a_mixer_without_matrices_is_refused():
    with pytest.raises(ValueError, match="align_matrices: BMojoF has no mixing matrices"):
        objective()(tiny_model("BMF*"), BATCH)
    with pytest.raises(ValueError, match="rows"):
        objective(rows=0)
