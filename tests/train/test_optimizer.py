"""The optimizer against torch's AdamW, the singular values of Muon's matrices, and schedules computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hybrid_jax.config import MoEConfig
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parameters import abstract_parameters, marks
from hybrid_jax.train import step as step_module
from hybrid_jax.train.objective import Mean, Outcome
from hybrid_jax.train.optimizer import learning_rate_schedule, make_optimizer
from hybrid_jax.train.state import Health, TrainState
from hybrid_jax.train.step import _judge, gradients_of, make_step
from tests.conftest import relative_error, tiny_config
from tests.train.conftest import Linear, phase

SHAPES = {
    "embed_tokens.embedding": (7, 4),
    "lm_head.kernel": (4, 7),
    "layers.0.mlp.gate_proj.kernel": (3, 4, 6),  # of three layers stacked
    "layers.0.mlp.experts.down_proj": (3, 2, 6, 4),
    "layers.0.mlp.gate.kernel": (3, 4, 2),
    "layers.0.gka.q_conv1d.kernel": (8, 4),
    "layers.0.gka.o_proj.kernel": (8, 3),
    "layers.0.gka.o_norm.weight": (3, 8),
    "layers.0.gka.A_log": (4,),
    "layers.0.gka.dt_bias": (4,),
    "layers.0.mamba.D": (4,),
    "layers.0.gka.alpha_proj.bias": (4,),
    "layers.0.input_layernorm.weight": (4,),
    "norm.weight": (4,),
}
EXPERTS = MoEConfig(num_experts=2, experts_per_token=1, intermediate_size=4)
MARKS = {  # as the models state them
    **{n: mark for moe in (EXPERTS, None) for n, mark in marks(abstract_decoder(tiny_config("M2>GKA", moe=moe))).items()},
}
NOT_DECAYED = {n for n in SHAPES if n.endswith(("norm.weight", "A_log", "bias", ".D"))}
MUON = {n for n in SHAPES if n.endswith(("gate_proj.kernel", "down_proj", "o_proj.kernel"))}


def arrays_like(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(shape)).astype(np.float32) for n, shape in SHAPES.items()}


def steps_of(monkeypatch, p, parameters, gradients):
    """(parameters, metrics) after every step of `make_step` whose gradients are these."""

    def objective(model, batch, teacher):
        loss = sum(jnp.sum(model[n] * batch[n]) for n in model)
        return Outcome(Mean(loss, jnp.float32(1)))

    monkeypatch.setattr(step_module, "make_objective", lambda name, options: objective)
    layout = Linear(p, MARKS)
    parameters = {n: jnp.asarray(x) for n, x in parameters.items()}
    state = TrainState(parameters, layout.optimizer.init(parameters), jax.tree.map(jnp.copy, Health.new()))
    step, found = make_step(layout, p), []
    for g in gradients:
        state, metrics = step(state, {}, g)
        found.append(({n: np.asarray(x) for n, x in state.trainable.items()}, {n: float(x) for n, x in metrics.items()}))
    return found


def torch_steps(p, parameters, gradients, rates):
    """torch's AdamW with two groups and clipping by the global norm; a step whose rate is None is not taken."""
    own = {n: torch.nn.Parameter(torch.from_numpy(x.copy())) for n, x in parameters.items()}
    groups = [
        {"params": [x for n, x in own.items() if (n in NOT_DECAYED) == free], "weight_decay": 0.0 if free else p.weight_decay}
        for free in (True, False)
    ]
    optimizer, found = torch.optim.AdamW(groups, lr=1.0, betas=(p.beta1, p.beta2), eps=1e-8), []
    for g, rate in zip(gradients, rates, strict=True):
        if rate is not None:
            norm = math.sqrt(sum(float(np.sum(np.float64(x) ** 2)) for x in g.values()))
            for n, x in own.items():
                x.grad = torch.from_numpy(g[n] * min(1.0, p.clip / norm if p.clip else 1.0))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        found.append({n: x.detach().numpy().copy() for n, x in own.items()})
    return found


ROUTINE = dict(beta1=0.8, beta2=0.9, weight_decay=0.3, warmup_steps=2, schedule="linear", steps=6, learning_rate=0.04)


def test_steps_are_torch_s_adamw_with_warmup_a_clipped_norm_and_decay_of_matrices_alone(monkeypatch):
    p, start = phase(clip=5.0, **ROUTINE), arrays_like(0)
    gradients = [arrays_like(n + 1, scale) for n, scale in enumerate((1.0, 0.1, 3.0, 0.2, 0.3))]  # some are clipped
    norms = [math.sqrt(sum(np.sum(x**2) for x in g.values())) for g in gradients]
    assert norms[0] > 5 > norms[1] and norms[2] > 5
    rates = [0.02, 0.04, 0.04, 0.03, 0.02]
    want = torch_steps(p, start, gradients, rates)
    for (found, metrics), wanted, rate, norm in zip(steps_of(monkeypatch, p, start, gradients), want, rates, norms, strict=True):
        for name in SHAPES:
            assert relative_error(found[name] - start[name], wanted[name] - start[name]) < 2e-5, name
        assert metrics["learning_rate"] == pytest.approx(rate, rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5), "logged before it is clipped"


def test_a_skipped_step_uses_up_its_place_in_the_schedule_and_leaves_the_moments_alone(monkeypatch):
    p, start = phase(clip=5.0, **ROUTINE), arrays_like(0)
    gradients = [arrays_like(n + 1) for n in range(5)]
    for bad in (1, 2):
        gradients[bad]["norm.weight"] = gradients[bad]["norm.weight"] * np.float32(np.nan)
    found = steps_of(monkeypatch, p, start, gradients)
    want = torch_steps(p, start, gradients, [0.02, None, None, 0.03, 0.02])
    for (parameters, _), wanted in zip(found, want, strict=True):
        for name in SHAPES:
            assert relative_error(parameters[name] - start[name], wanted[name] - start[name]) < 2e-5, name
    assert [m["learning_rate"] for _, m in found] == pytest.approx([0.02, 0.04, 0.04, 0.03, 0.02], rel=1e-6)
    assert [(m["skipped"], m["skipped_in_a_row"]) for _, m in found] == [(0, 0), (1, 1), (2, 2), (2, 0), (2, 0)]


def test_clip_0_is_no_clipping(monkeypatch):
    p, start, gradients = phase(clip=0.0, **ROUTINE), arrays_like(0), [arrays_like(1, 100.0), arrays_like(2, 0.1)]
    want = torch_steps(p, start, gradients, [0.02, 0.04])
    for (found, _), wanted in zip(steps_of(monkeypatch, p, start, gradients), want, strict=True):
        assert all(relative_error(found[n] - start[n], wanted[n] - start[n]) < 2e-5 for n in SHAPES)


def test_under_muon_everything_else_gets_adamw_s_update_and_the_same_decay():
    parameters, gradients = arrays_like(0), [arrays_like(1), arrays_like(2), arrays_like(3)]
    found = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(phase(optimizer=name, weight_decay=0.5, beta1=0.7, beta2=0.8, clip=3.0), MARKS)
        state = optimizer.init(parameters)
        for g in gradients:
            found[name], state = optimizer.update(g, state, parameters)
    for name in SHAPES:
        assert np.array_equal(found["adamw"][name], found["muon"][name]) == (name not in MUON), name
    zeros = {n: np.zeros_like(x) for n, x in parameters.items()}
    optimizer = make_optimizer(phase(optimizer="muon", weight_decay=0.5), MARKS)
    still, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    for name, x in parameters.items():
        assert np.allclose(still[name], 0 if name in NOT_DECAYED else 0.5 * x), name


def newton_schulz(x):
    """Five times s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5 of the singular values of x / |x|, scaled to the RMS of AdamW."""
    u, s, v = np.linalg.svd(np.float64(x) / np.linalg.norm(np.float64(x)), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(x.shape)) * (u * s) @ v


def test_muon_orthogonalizes_every_layer_s_and_every_expert_s_own_matrix():
    parameters, gradients = arrays_like(0), [arrays_like(1), arrays_like(2)]
    optimizer = make_optimizer(phase(optimizer="muon", clip=0.0), MARKS)
    state = optimizer.init(parameters)
    found, state = optimizer.update(gradients[0], state, parameters)
    again, state = optimizer.update(gradients[1], state, parameters)
    for name in MUON:
        first, second = (g[name].reshape(-1, *SHAPES[name][-2:]) for g in gradients)
        momentum = 0.05 * (0.95 * first + second)
        nesterov = 0.95 * momentum / (1 - 0.95**3) + 0.05 * second / (1 - 0.95**2)
        for i in range(len(first)):
            assert relative_error(found[name].reshape(first.shape)[i], newton_schulz(first[i])) < 1e-4, name
            assert relative_error(again[name].reshape(first.shape)[i], newton_schulz(nesterov[i])) < 1e-4, name


def test_muon_s_matrices_are_the_projections_and_the_experts():
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8)
    config = tiny_config("*-GKA-M2", moe=moe, tie_embeddings=False)
    names = abstract_parameters(config)
    others = {n for n, mark in marks(abstract_decoder(config)).items() if not mark.muon}
    assert {n for n in others if len(names[n].shape) > 1} == {
        "embed_tokens.embedding",
        "lm_head.kernel",
        *(f"layers.{i}.mlp.gate.kernel" for i in range(3)),
        *(f"layers.1.gka.{x}_conv1d.kernel" for x in "qkv"),
        "layers.2.mamba.conv1d.kernel",
    }
    assert "layers.0.mlp.experts.up_proj" not in others


def test_schedules_at_their_boundaries():
    def at(*steps, **changes):
        schedule = learning_rate_schedule(phase(learning_rate=2.0, steps=10, **changes))
        return pytest.approx([float(schedule(s)) for s in steps], rel=1e-6)

    assert at(0, 5, 9, schedule="constant") == [2, 2, 2]
    assert at(0, 1, 2, 3, schedule="constant", warmup_steps=4) == [0.5, 1.0, 1.5, 2.0]
    assert at(0, 5, 10, schedule="linear", final_fraction=0.1) == [2, 1.1, 0.2]
    assert at(1, 2, 6, 10, schedule="linear", warmup_steps=2, final_fraction=0.1) == [2, 2, 1.1, 0.2]
    assert at(0, 5, 10, schedule="cosine", final_fraction=0.1) == [2, 1.1, 0.2]
    quarter = 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2
    assert at(0, 1, 2, 4, 10, schedule="cosine", warmup_steps=2, final_fraction=0.1) == [1, 2, 2, quarter, 0.2]
    wsd = dict(schedule="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.1)
    assert at(0, 1, 2, 6, 7, 8, 10, **wsd) == [1, 2, 2, 2, 1.55, 1.1, 0.2]
    assert at(0, 9, schedule="cosine", warmup_fraction=0.95) == [0.2, 2]


def test_parts_of_a_batch_weigh_what_their_losses_are_means_over():
    def loss_of(trainable, frozen, batch):
        return Mean.of(trainable * batch["x"], batch["weights"]), {}

    x, weights = np.array([[1.0], [2.0], [4.0], [8.0]]), np.array([[0.1], [0.1], [0.0], [0.3]])  # less than 1 in all
    batch = {"x": jnp.asarray(x, "float32"), "weights": jnp.asarray(weights, "float32")}
    want = float((x * weights).sum() / weights.sum())  # 5.4
    for parts in (1, 2):
        grads, metrics = gradients_of(loss_of, jnp.float32(3), {}, batch, parts)
        assert float(grads) == pytest.approx(want) and float(metrics["loss"]) == pytest.approx(3 * want)
        assert float(metrics["loss"].weight) == pytest.approx(0.5)


def test_spikes_are_counted_against_means_of_the_steps_that_counted():
    health, taken = Health.new(), []
    losses = [4.0, 2.0, *[2.0] * 18, 12.0, 3.0, 2.0, 12.0, np.inf, 2.0]
    mean = 0.0
    for loss in losses:
        health, good = _judge(health, jnp.float32(loss), jnp.float32(1.0), 3.0)
        taken.append(bool(good))
        if good:
            mean = loss if not mean else 0.98 * mean + 0.02 * loss
    assert taken == [True] * 20 + [False, True, True, False, False, True]
    assert float(health.mean_loss) == pytest.approx(mean, rel=1e-5) and 2 < mean < 3.4
    assert (int(health.steps), int(health.skipped), int(health.in_a_row)) == (23, 3, 0)


def test_moments_of_what_trains_are_all_the_optimizer_holds():
    """Two of AdamW's for every scalar, one of Muon's; beside them a few numbers."""
    parameters = arrays_like(0)
    count = {True: sum(x.size for n, x in parameters.items() if n in MUON), False: 0}
    count[False] = sum(x.size for x in parameters.values()) - count[True]
    for name, want in (("adamw", 2 * sum(count.values())), ("muon", count[True] + 2 * count[False])):
        state = make_optimizer(phase(optimizer=name), MARKS).init(parameters)
        assert 0 <= sum(np.size(x) for x in jax.tree.leaves(state)) - want < 10
