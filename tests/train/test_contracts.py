"""What a stranger adds through the public contracts alone: an objective with a teacher, a metric of its own, a hook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.data.layout import TEACHER
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parameters import split_model
from hybrid_jax.train.interval import Interval
from hybrid_jax.train.objective import INPUTS, Mean, Objective, mean_over_tokens
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.step import make_step
from tests.conftest import relative_error, tiny_model
from tests.train.conftest import batch_of, one_step, phase


def toy(model, batch, teacher=None, *, kind="absolute"):
    """The final states' distance from the teacher's: an objective that is one function and one row."""
    streams = model.two_streams(batch["input_ids"], batch["segment_ids"], batch["positions"], teacher=teacher)
    power = {"absolute": 1, "square": 2}[kind]
    distances = jnp.mean(jnp.abs(streams.student - jax.lax.stop_gradient(streams.teacher)) ** power, axis=-1)
    return mean_over_tokens(distances, (batch["segment_ids"] > 0).astype(jnp.float32))


@pytest.fixture
def table(monkeypatch):
    """Adds a row to `OBJECTIVES`."""
    return lambda name, objective: monkeypatch.setitem(OBJECTIVES, name, objective)


def test_a_new_objective_with_two_streams_trains_the_student_and_not_its_teacher(table):
    table("toy", Objective(toy, reads=INPUTS, two_streams=True))
    model, batch = tiny_model("*DA-SWA*"), batch_of()
    with pytest.raises(ValueError, match="compares two streams; set phase.form = 'fused'"):
        phase(objective="toy")
    with pytest.raises(ValueError, match="objective 'toy' has no option 'target'; it has kind"):
        phase(objective="toy", form="fused", options={"target": 1})
    p = phase(objective="toy", form="fused", options={"kind": "square"})  # all that can train does
    layout = PhaseLayout(model, p)
    state, frozen, _ = layout.begin(None, split_model(model)[1])

    def taught(state):
        own, teacher = layout.models(state.trainable, frozen)
        return (teacher or own).hidden_states(batch["input_ids"], stream="teacher")[0]

    before, step, losses = taught(state), make_step(layout, p), []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert relative_error(taught(state), before) < 1e-6 and losses[-1] < losses[0]


def test_an_objective_gets_of_the_batch_what_it_declares(table):
    table("toy", Objective(lambda model, batch, teacher=None: toy(model, {**batch, "x": batch["targets"]}), reads=INPUTS))
    with pytest.raises(KeyError, match="targets"):
        OBJECTIVES["toy"](tiny_model("*DA-SWA*"), batch_of())
    table("cached", Objective(toy, reads=(*INPUTS, *TEACHER)))
    with pytest.raises(ValueError, match="'cached' needs a phase.teacher_cache"):
        phase(objective="cached")


def test_a_metric_has_its_own_denominator_however_the_batch_is_divided(table):
    """Answers weigh 2, and are few: the first rows have none."""

    def answers(model, batch, teacher=None):
        hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
        losses = cross_entropy(hidden, model.head, batch["targets"])
        own = (batch["weights"] == 2).astype(jnp.float32)
        return mean_over_tokens(losses, batch["weights"], {"answers": Mean.of(losses, own)})

    table("answers", Objective(answers))
    batch = batch_of(rows=6)
    weights = np.array(batch["weights"])
    weights[3, 1], weights[4, 2:9], weights[5, 3:5] = 2, 2, 2
    batch["weights"] = weights
    found = {}
    for parts in (1, 3):
        model = tiny_model("*-SWA")
        _, _, metrics = one_step(model, batch, objective="answers", batch_size=6, accumulate=parts)
        interval = Interval()
        interval.add(metrics)
        found[parts] = interval.means(interval.take())
        assert metrics["answers"].weight == 10 and metrics["loss"].weight == weights.sum()
    assert found[3] == pytest.approx(found[1], rel=1e-5)
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    losses = np.asarray(cross_entropy(hidden, model.head, batch["targets"]))
    assert found[3]["answers"] == pytest.approx(losses[weights == 2].mean(), rel=1e-5)
