"""DPO against float64: the loss of pairs in rows, its direction, parts of a batch, the reference, which a resumed phase keeps."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.data import read_corpus
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.packing import PackedRows
from hybrid_jax.data.tokens import Tokens
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.plan.program import compile_program, training_program
from hybrid_jax.train import MetricWriter, NoMetrics, read_metrics
from hybrid_jax.train.loop import apply_phase_settings, train_phase
from hybrid_jax.train.objectives import make_objective
from hybrid_jax.train.phase_layout import TEACHER, PhaseLayout
from tests.conftest import tiny_config, tiny_model
from tests.data.test_pairs import directory, written
from tests.train.conftest import arrays, one_step, phase

__all__ = ["directory"]  # a fixture
PROMPT = 3  # tokens of every prompt
LENGTHS = [(7, 5), (4, 9), (6, 6), (4, 4), (10, 5)]


@pytest.fixture(scope="module")
def conversations():
    """Token ids of (chosen, rejected) of each pair, which begin with the same prompt."""
    rng, found = np.random.default_rng(0), []
    for sizes in LENGTHS:
        prompt = rng.integers(1, 61, PROMPT)
        found.append([np.concatenate([prompt, rng.integers(1, 61, n - PROMPT)]) for n in sizes])
    return found


@pytest.fixture(scope="module")
def batch(conversations):
    """The pairs in rows of 24 tokens, unevenly many in each, with a row of padding."""
    flat = [ids for pair in conversations for ids in pair]
    starts = np.cumsum([0, *map(len, flat)])
    learned = np.concatenate([np.arange(len(ids)) >= PROMPT for ids in flat]).astype(np.uint8)
    packed = PackedRows(Tokens(np.concatenate(flat).astype(np.uint16), starts, learned, pairs=True), 24, "pairs")
    assert [row["segment_ids"].max() for row in packed] == [4, 4, 2]
    rows = [*packed, {name: np.zeros_like(x) for name, x in packed[0].items()}]
    return training_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})


def answers(model, conversations):
    """The log-probabilities of [pairs, 2] answers, each conversation in a row of its own, in float64."""
    flat = [ids for pair in conversations for ids in pair]
    longest = max(map(len, flat))
    ids, real = (np.stack([np.pad(f(x), (0, longest - len(x))) for x in flat]) for f in (np.asarray, np.ones_like))
    logits = np.asarray(nnx.jit(lambda model: model(ids, real))(model), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array([sum(log_p[n, t - 1, x[t]] for t in range(PROMPT, len(x))) for n, x in enumerate(flat)]).reshape(-1, 2)


@pytest.mark.parametrize("beta, smoothing", [(0.1, 0.0), (0.5, 0.2)])
def test_the_loss_is_that_of_each_answer_alone(conversations, batch, beta, smoothing):
    model, reference = tiny_model("*"), tiny_model("*", seed=1)
    loss, metrics, tokens = make_objective("dpo", dict(beta=beta, label_smoothing=smoothing))(model, batch, reference)
    policy, fixed = (answers(m, conversations) for m in (model, reference))
    margin = beta * ((policy - fixed) @ [1, -1])
    want = (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))
    assert float(loss) == pytest.approx(want.mean(), rel=1e-5) and float(loss.weight) == len(LENGTHS) and tokens is None
    means = {"reward_margin": margin, "chosen_log_probability": policy[:, 0], "rejected_log_probability": policy[:, 1]}
    assert {n: float(metrics[n]) for n in means} == pytest.approx({n: x.mean() for n, x in means.items()}, rel=1e-4)
    assert 0 < (margin > 0).mean() < 1 and float(metrics["reward_accuracy"]) == pytest.approx((margin > 0).mean())


def test_a_step_prefers_what_was_chosen_to_what_the_reference_prefers(batch):
    model, loss = tiny_model("*"), make_objective("dpo", {})
    _, before, _ = loss(model, batch, model)
    _, after, metrics = one_step(model, batch, objective="dpo", learning_rate=1e-3, schedule="constant")
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["reward_margin"]) == pytest.approx(0, abs=1e-6)
    _, now, _ = loss(join_model(split_model(model)[0], after.trainable), batch, model)
    assert float(now["reward_margin"]) > 0
    assert float(now["chosen_log_probability"]) > float(before["chosen_log_probability"])


def test_parts_of_a_batch_weigh_by_their_pairs(batch):
    model = tiny_model("*")
    together, parts = (one_step(model, batch, objective="dpo", batch_size=4, accumulate=n)[2] for n in (1, 2))
    for name in ("grad_norm", "chosen_log_probability", "rejected_log_probability"):
        got, want = (float(x[name].value if hasattr(x[name], "value") else x[name]) for x in (parts, together))
        assert got == pytest.approx(want, rel=1e-5), name


@pytest.fixture(scope="module")
def corpus(directory, tmp_path_factory):
    records = [{"prompt": "abc" * (1 + i % 3), "chosen": "def" * (1 + i % 4), "rejected": "c b" * (1 + i % 2)} for i in range(120)]
    path = written(tmp_path_factory.mktemp("data") / "pairs.jsonl", records)
    return read_corpus({"text": path}, directory)


def preferred(corpus, directory, writer=None, **changes):
    model = tiny_model("*-SWA-SWA", vocab_size=corpus.tokenizer.get_vocab_size())
    p = phase(**{**dict(objective="dpo", steps=4, seq_len=96, eval_every=2, eval_rows=2, trainable=(r"\.swa\.",)), **changes})
    return train_phase(model, "p", p, corpus, {"text": 1.0}, seed=0, directory=directory, writer=writer or NoMetrics())


def test_a_resumed_phase_keeps_the_reference_that_it_began_with(corpus, tmp_path):
    writer = MetricWriter(tmp_path / "run")
    whole = arrays(preferred(corpus, tmp_path / "run" / "checkpoints", writer))
    writer.close()
    values = {r["step"]: r for r in read_metrics(tmp_path / "run")}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = arrays(preferred(corpus, tmp_path / "run" / "checkpoints"))
    assert all(np.array_equal(whole[n], again[n]) for n in whole)
    assert abs(values[1]["reward_margin"]) < 1e-6 and values[4]["reward_margin"] > 1e-3
    evaluated = [r for r in read_metrics(tmp_path / "run") if "eval/loss/text" in r]
    assert [r["step"] for r in evaluated] == [2, 4]
    assert evaluated[-1]["eval/loss/text"] < np.log(2) and 0 <= evaluated[-1]["eval/reward_accuracy/text"] <= 1
    assert evaluated[-1]["eval/reward_margin/text"] > 0


def test_the_reference_shares_what_does_not_train(corpus, capsys, tmp_path):
    preferred(corpus, tmp_path, steps=1, eval_every=0)
    one = tiny_model("*-SWA-SWA", vocab_size=corpus.tokenizer.get_vocab_size())
    own = sum(x.size for n, x in split_model(one)[1].items() if ".swa." in n)
    assert f"the reference keeps {own:,} of its own" in capsys.readouterr().out


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_frozen_dtype_does_not_round_the_reference_of_what_trains(batch, compute_dtype):
    model = tiny_model("GDN")  # its convolutions are computed in float32
    p = phase(objective="dpo", frozen_dtype="bfloat16", compute_dtype=compute_dtype)
    layout = PhaseLayout(apply_phase_settings(model, p), p)
    state, frozen, _ = layout.begin(None, split_model(model)[1])

    @jax.jit
    def margin(trainable, frozen):
        policy, reference = layout.models(trainable, frozen)
        return make_objective("dpo", {})(policy, batch, reference).metrics["reward_margin"].value

    assert abs(float(margin(state.trainable, frozen))) < 1e-6
    halves = {n for n, x in frozen.items() if x.dtype == "bfloat16"}
    assert bool(halves) == (compute_dtype == "bfloat16") and not any("conv" in n for n in halves)


def test_a_phase_is_planned_with_its_reference():
    config = tiny_config("*-SWA")
    program = training_program(config, phase(objective="dpo", batch_size=2), make_mesh({"data": 1}, jax.devices()[:1]))
    state, frozen, _ = program.arguments
    assert {n.removeprefix(TEACHER) for n in frozen} == set(state.trainable) and program.teacher > 0
    assert compile_program(program).total > program.parameters


def test_what_dpo_cannot_learn_from_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="text has preference pairs, so its rejected answers would be learned"):
        preferred(corpus, tmp_path, objective="next_token")
    with pytest.raises(ValueError, match="has no teacher's stream; set phase.form = 'unfused'"):
        phase(objective="dpo", form="fused")
    for options in (dict(beta=0), dict(label_smoothing=0.5)):
        with pytest.raises(ValueError, match=next(iter(options))):
            phase(objective="dpo", options=options)
