"""Iterations of Gated KalmaNet at inference: a model with them is the model whose config has so many, and nothing else changes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import generate, load_model, save_model, with_iterations
from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.iterations import as_text, read_iterations
from hybrid_jax.parallel.mesh import abstract_mesh
from hybrid_jax.parameters import join_model, split_model, with_config
from hybrid_jax.repeats import find_repeats
from tests.conftest import relative_error, tiny_config, tiny_model

TRAINED = GKAConfig(num_iter=6, chunk_size=16)
IDS = np.random.default_rng(0).integers(1, 61, (1, 9), dtype=np.int32)


def trained_with(model, number):
    """The same parameters in a model whose options have so many iterations."""
    options = dataclasses.replace(model.config.options(GKAConfig), num_iter=number)
    return with_config(model, model.config.with_options(options))


def program(model, ids=IDS):
    """What is computed of a forward pass and, where the program is for one device, of a prompt and a token decoded behind it.

    It is the program as text, with every loop and its length: models with equal parameters and equal programs compute equal bits.
    """
    structure, parameters = split_model(model)
    at = np.arange(ids.shape[1], dtype=np.int32)[None]

    def run(parameters):
        model = join_model(structure, parameters)
        found = [model.hidden_states(ids, np.ones_like(ids), at)]
        state = None if ids is not IDS else model.init_state(1, 9)
        for part in () if state is None else (np.s_[:, :8], np.s_[:, 8:]):
            hidden, state = model.hidden_states(ids[part], np.ones_like(ids[part]), at[part], state)
            found.append((hidden, state))
        return found

    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(parameters)))


def test_a_forward_pass_and_decoding_have_every_bit_of_a_model_trained_with_so_many_iterations():
    model = tiny_model("GKA", gka=TRAINED)

    def outputs(model):
        tokens = generate(model, [[5, 6, 7]], max_new_tokens=6)
        structure, parameters = split_model(model)
        return tokens, np.asarray(jax.jit(lambda p: join_model(structure, p)(IDS))(parameters))

    (tokens, logits), (wanted, exact), (_, trained) = map(outputs, (with_iterations(model, 1), trained_with(model, 1), model))
    assert tokens == wanted and np.array_equal(logits, exact) and relative_error(logits, trained) > 1e-3


@pytest.mark.parametrize("solver", ["chebyshev", "cg"])
@pytest.mark.parametrize("number", [0, 2])
def test_both_solvers_have_the_iterations_of_a_model_trained_with_so_many(solver, number):
    model = tiny_model("GKA-*-GKA", gka=dataclasses.replace(TRAINED, solver=solver))
    found = program(with_iterations(model, number))
    assert found == program(trained_with(model, number)) != program(model)


@pytest.mark.parametrize("pattern", ["*-GKA[1]", "*-BMF", "*-GKA*"])
def test_a_mixer_inside_a_layer_or_beside_its_teacher_has_them_too(pattern):
    model = tiny_model(pattern, gka=TRAINED)
    assert program(with_iterations(model, 2)) == program(trained_with(model, 2)) != program(model)


def test_where_tokens_are_sharded_it_is_the_same():
    model, ids = tiny_model("*-GKA", gka=TRAINED), np.ones((1, 16), np.int32)
    with jax.sharding.use_abstract_mesh(abstract_mesh({"seq": 2})):
        found = program(with_iterations(model, 2), ids)
        assert "ppermute" in found
        assert found == program(trained_with(model, 2), ids) != program(model, ids)


def test_by_layer_each_layer_has_its_own_and_the_others_stay():
    model = tiny_model("GKA-GKA-*-GKA", gka=TRAINED)
    wanted = with_config(model, model.config)
    wanted.layers = nnx.List([trained_with(model, n).layers[i] for i, n in enumerate((2, 6, 6, 1))])
    swapped, set_to = (with_iterations(model, given) for given in ({0: 1, 3: 2}, {0: 2, 3: 1}))
    wanted.scan = swapped.scan = set_to.scan = False
    assert program(set_to) == program(wanted) != program(swapped)
    assert set_to.config.gka_iterations == (2, None, None, 1)


def test_only_layers_of_equal_iterations_are_scanned_together():
    config = tiny_config("GKA-GKA-GKA-GKA", gka=TRAINED)
    all_of_them, pairs = [(0, 1, 4)], [(0, 1, 2), (2, 1, 2)]
    for given, repeats in ((3, all_of_them), ({0: 1, 1: 1}, pairs), ({1: 6}, all_of_them), ({1: 5}, [(0, 2, 1), (2, 1, 2)])):
        assert find_repeats(config.with_iterations(given).programs) == repeats
    model = with_iterations(tiny_model("GKA-GKA-GKA-GKA", gka=TRAINED), {0: 1, 1: 1})
    structure, parameters = split_model(model)
    jaxpr = jax.make_jaxpr(lambda p: join_model(structure, p).hidden_states(IDS)[0])(parameters)
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [2, 2]


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
