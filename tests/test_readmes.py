"""The Python blocks of every guide run, and what the guides add to the project works."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import COMMANDS
from hybrid_jax.config import ATTENTION, MixerSpec
from hybrid_jax.data import read_tasks
from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.instruments import INSTRUMENTS, Subject, make_instrument
from hybrid_jax.families import FAMILIES
from hybrid_jax.layers import MIXERS
from hybrid_jax.mixers import KINDS
from hybrid_jax.parameters import marks, split_model
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train.objectives import OBJECTIVES
from tests.conftest import ROOT, guides, relative_error, tiny_model
from tests.train.conftest import batch_of, one_step

GUIDES = [str(p.relative_to(ROOT)) for p in guides()]
TABLES = (COMMANDS, FAMILIES, INSTRUMENTS, KINDS, MIXERS, OBJECTIVES)


def blocks(guide):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / guide).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def tables():
    """The project's tables, as they were afterwards."""
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if blocks(guide)])
def test_the_python_of_a_guide_runs(guide, tables, tmp_path, monkeypatch):
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "guide"}
    for code in blocks(guide):
        exec(compile(code, guide, "exec"), namespace)


def test_links_of_guides_lead_somewhere():
    for guide in GUIDES:
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / guide).read_text()):
            assert ((ROOT / guide).parent / link).exists(), f"{guide}: {link}"


@pytest.fixture
def guide(tables):
    """What hybrid_jax/README.md adds to the project."""
    namespace = {"__name__": "guide"}
    for code in blocks("hybrid_jax/README.md"):
        exec(compile(code, "hybrid_jax/README.md", "exec"), namespace)
    return namespace


def test_the_guide_s_instrument_measures_a_model(guide, corpus):
    subject = Subject(tiny_model("*-GKA", vocab_size=300), corpus.tokenizer, corpus)
    (found,) = make_instrument("mine", dict(instrument="surprise", seq_len=32, rows=3)).measure(subject)
    assert 0.9 < found.value <= 1 and found.low < found.value and found.count == 3


def test_the_guide_s_evaluation_is_one_whose_heat_map_measures_a_model(corpus):
    namespace = {}
    (code,) = blocks("hybrid_jax/evaluate/README.md")
    exec(compile(code, "hybrid_jax/evaluate/README.md", "exec"), namespace)
    evaluation = Evaluation.from_config(namespace["get_config"]())
    assert list(evaluation.instruments) == ["text", "needle", "cost"]
    needle = evaluation.instruments["needle"]
    texts = dataclasses.replace(corpus, tasks=read_tasks(evaluation.data))
    model = tiny_model("*", vocab_size=300, max_position_embeddings=1024)
    needle.check(model.config, texts)
    small = dataclasses.replace(needle, rows=1, grid={"seq_len": (32,), "depth": (0.0, 1.0)})
    found = small.measure(Subject(model, corpus.tokenizer, texts))
    assert [dict(m.at) for m in found if m.measure == "exact"] == [{"seq_len": 32, "depth": 0.0}, {"seq_len": 32, "depth": 1.0}]


def test_the_guide_s_mixer_is_primed_trained_exported_and_decoded(guide, tmp_path):
    source = tiny_model("*-*-*")
    model = initialize_hybrid(source, "*-GLA-GLA")
    kernels = split_model(model)[1]
    assert np.array_equal(kernels["layers.1.gla.q_proj.kernel"], split_model(source)[1]["layers.1.self_attn.q_proj.kernel"])

    batch = batch_of()
    before, after, metrics = one_step(model, batch, objective="next_token", remat="full")
    moved = {n for n, x in after.trainable.items() if not np.array_equal(x, before.trainable[n])}
    assert np.isfinite(float(metrics["loss"])) and {"layers.1.gla.decay", "layers.1.gla.q_proj.kernel"} <= moved
    assert not marks(model)["layers.1.gla.decay"].compute and not marks(model)["layers.1.gla.decay"].decay

    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["hybrid_override_pattern"] == "*-GLA-GLA"
    for name, x in split_model(again)[1].items():
        assert np.array_equal(x, kernels[name]), name

    ids, ones = jnp.arange(1, 10)[None], jnp.ones((1, 1), jnp.int32)
    want, state, found = model(ids), model.init_state(1, 9), []
    for t in range(9):
        hidden, state = model.hidden_states(ids[:, t : t + 1], ones, ones * t, state)
        found.append(model.head(hidden))
    assert relative_error(jnp.concatenate(found, axis=1), want) < 1e-5
    shapes, axes = jax.tree.map(jnp.ndim, state), model.state_axes()
    assert jax.tree.map(len, axes, is_leaf=lambda x: type(x) is tuple and all(isinstance(a, str | None) for a in x)) == shapes
    options = model.config.with_options(guide["GLAConfig"](norm_eps=0.1))
    assert options.options(guide["GLAConfig"]).norm_eps == 0.1 and options.layers[1] == MixerSpec("gla") != MixerSpec(ATTENTION)


def test_a_matrix_that_must_stay_float32_is_not_rounded_to_the_compute_dtype(guide):
    """The guide's decay is a matrix, which by its rank alone would be cast to bfloat16."""
    config = tiny_model("*-GLA").config
    model = type(tiny_model("*"))(config, rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16)
    decay = model.layers[1].gla.decay
    ids = jnp.arange(1, 49)[None]
    decay.set_value(jnp.full_like(decay.get_value(), 1 + 2**-9))  # 1 in bfloat16
    with_it = model.hidden_states(ids)[0]
    decay.set_value(jnp.ones_like(decay.get_value()))
    assert not np.array_equal(with_it, model.hidden_states(ids)[0])


def test_the_guide_s_objective_trains_with_its_option(guide):
    model, batch = tiny_model("*"), batch_of()
    losses = [float(one_step(model, batch, objective="label_smoothing", options={"smoothing": s})[2]["loss"]) for s in (0.0, 1.0)]
    plain = float(one_step(model, batch, objective="next_token")[2]["loss"])
    assert losses[0] == pytest.approx(plain, rel=1e-6) and losses[1] != pytest.approx(plain, rel=1e-3)
