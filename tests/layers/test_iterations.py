"""Iterations of Gated KalmaNet at inference: a model with them is the model whose config has so many, and nothing else changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import generate, load_model, save_model, with_iterations
from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.iterations import as_text, read_iterations
from hybrid_jax.parameters import split_model, with_config
from hybrid_jax.repeats import find_repeats
from tests.conftest import relative_error, run_processes, tiny_config, tiny_model

TRAINED = GKAConfig(num_iter=6, chunk_size=16)
IDS = np.random.default_rng(0).integers(1, 61, (1, 9))


def trained_with(model, number):
    """The same parameters in a model whose options have so many iterations."""
    options = dataclasses.replace(model.config.options(GKAConfig), num_iter=number)
    return with_config(model, model.config.with_options(options))


def outputs(model):
    """Final states of a forward pass, of a prompt of seven tokens and of the two decoded after it, and the state they leave."""
    state, parts = model.init_state(1, 9), []
    for part in (np.s_[:, :7], np.s_[:, 7:8], np.s_[:, 8:]):
        positions = np.arange(9)[None][part]
        hidden, state = model.hidden_states(IDS[part], np.ones_like(positions), positions, state)
        parts.append(hidden)
    return [np.asarray(x) for x in jax.tree.leaves((model.hidden_states(IDS)[0], parts, state))]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


@pytest.mark.parametrize("solver", ["chebyshev", "cg"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_model_computes_and_decodes_what_one_trained_with_so_many_iterations_does(solver, number):
    model = tiny_model("GKA-*-GKA", gka=dataclasses.replace(TRAINED, solver=solver))
    set_to = with_iterations(model, number)
    assert same(set_to, trained_with(model, number)) and not same(set_to, model)


@pytest.mark.parametrize("pattern", ["*-GKA[1]", "*-BMF", "*-GKA*"])
def test_a_mixer_inside_a_layer_or_beside_its_teacher_has_them_too(pattern):
    model = tiny_model(pattern, gka=TRAINED)
    assert same(with_iterations(model, 2), trained_with(model, 2)) and not same(with_iterations(model, 2), model)


def test_by_layer_each_layer_has_its_own_and_the_others_stay():
    model = tiny_model("GKA-GKA-*-GKA", gka=TRAINED)
    set_to = with_iterations(model, {0: 2, 3: 1})
    wanted = with_config(model, model.config)
    wanted.layers = nnx.List([trained_with(model, n).layers[i] for i, n in enumerate((2, 6, 6, 1))])
    set_to.scan = wanted.scan = False
    assert same(set_to, wanted)
    assert not same(with_iterations(model, {0: 1, 3: 2}), wanted) and set_to.config.gka_iterations == (2, None, None, 1)


def test_only_layers_of_equal_iterations_are_scanned_together():
    model = tiny_model("GKA-GKA-GKA-GKA", gka=TRAINED)
    for iterations, repeats in ((3, [(0, 1, 4)]), ({0: 1, 1: 1}, [(0, 1, 2), (2, 1, 2)]), ({1: 6}, [(0, 1, 4)])):
        set_to = with_iterations(model, iterations)
        assert find_repeats(set_to.config.programs) == repeats
        scanned = set_to(IDS)
        set_to.scan = False
        assert relative_error(scanned, set_to(IDS)) < 1e-6
    assert relative_error(with_iterations(model, {0: 1, 1: 1})(IDS), with_iterations(model, 1)(IDS)) > 1e-3


def test_on_a_mesh_that_shards_tokens_it_is_the_same():
    found = json.loads(run_processes("tests.distributed.iteration_programs", 1, devices=2).splitlines()[-1])
    assert found == {"equal to the config's": True, "equal to the trained": False}


def test_the_saved_model_is_not_changed_and_one_with_iterations_is_not_saved(tmp_path):
    save_model(tiny_model("*-GKA", gka=TRAINED), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model = load_model(tmp_path / "model")
    set_to = with_iterations(model, 2)
    assert (
        generate(set_to, [[5, 6]], max_new_tokens=2) and {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    )
    with pytest.raises(ValueError, match=r"not saved; save hybrid_jax.with_iterations\(model, None\)"):
        save_model(set_to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = with_iterations(set_to, None)
    assert again.config == model.config and with_iterations(model, 6) is model and with_iterations(model, {1: 6}) is model
    save_model(again, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["gka_config"]["num_iter"] == 6
    arrays = (split_model(m)[1] for m in (model, set_to))
    assert all(a is b for a, b in zip(*(named.values() for named in arrays), strict=True))


def test_settings_of_the_model_stay():
    model = tiny_model("*-GKA", gka=TRAINED)
    model.remat, model.scan = "full", False
    set_to = with_iterations(model, 2)
    assert (set_to.remat, set_to.scan, set_to.compute_dtype) == ("full", False, jnp.float32)


def test_layers_that_keep_their_mixer_keep_their_iterations():
    fused = tiny_config("GKA*-*DA-GKA*", gka=TRAINED).with_iterations({0: 2, 2: 3})
    assert fused.unfused().gka_iterations == (2, None, 3) and fused.teacher().gka_iterations == ()
    assert fused.with_pattern("GKA-*-GDN").gka_iterations == (2, None, None)


@pytest.mark.parametrize(
    "pattern, iterations, message",
    [
        ("*-GDN", 3, r"the model has none; its pattern is \*-GDN"),
        ("*-GDN", {1: 3}, r"the model has none; its pattern is \*-GDN"),
        ("*-GKA", {0: 3}, r"layer 0, which is \*; the layers with Gated KalmaNet are 1"),
        ("*-GKA", {2: 3}, "layer 2, which does not exist; the layers with Gated KalmaNet are 1"),
        ("*-GKA", {-1: 3}, "layer -1, which does not exist"),
        ("*-GKA", -1, "iterations must be an integer at least 0 and at most 10000, got -1"),
        ("*-GKA", 10_001, "at most 10000, got 10001"),
        ("*-GKA", 2.0, "must be an integer"),
        ("*-GKA", True, "must be an integer"),
        ("*-GKA", {1: 10_001}, "iterations, layer 1, must be an integer at least 0 and at most 10000"),
        ("*-GKA", {}, "must be 8, of every layer"),
    ],
)
def test_what_a_model_cannot_do_is_refused(pattern, iterations, message):
    with pytest.raises(ValueError, match=message):
        with_iterations(tiny_model(pattern, gdn=GDNConfig()), iterations)


def test_iterations_that_the_mixer_s_options_do_not_allow_are_refused():
    config = tiny_config("*-GKA", gka=GKAConfig(num_iter=0, use_forgetting_gate_kk=False))
    with pytest.raises(ValueError, match="iterations of layer 1: .*only without the solve"):
        config.with_iterations(4)
    with pytest.raises(ValueError, match="gka_iterations has 1 entries, the model has 2 layers"):
        dataclasses.replace(tiny_config("*-GKA"), gka_iterations=(3,))
    with pytest.raises(ValueError, match="iterations of layer 0, which is"):
        dataclasses.replace(tiny_config("*-GKA"), gka_iterations=(3, None))


def test_text_says_what_numbers_say():
    for text, value in (("8", 8), ("0", 0), ("3:8", {3: 8}), ("5:4,3:8", {3: 8, 5: 4})):
        assert read_iterations("it", text) == read_iterations("it", value) == value
        assert read_iterations("it", as_text(value)) == value
    assert as_text({5: 4, 3: 8}) == "3:8,5:4"
    for wrong in ("", "x", "-1", "1.5", "3:", "3:8,", "3:8,4", "a:1", "3:8:2"):
        with pytest.raises(ValueError, match="it.* must be "):
            read_iterations("it", wrong)
    with pytest.raises(ValueError, match="names layer 3 twice"):
        read_iterations("it", "3:8,3:4")
