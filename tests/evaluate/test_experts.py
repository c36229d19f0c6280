"""The instrument of experts: it counts what the routers choose, in layers with experts, of tokens and not of padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import MoEConfig
from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.instruments.contract import Subject
from hybrid_jax.evaluate.instruments.experts import _choices
from hybrid_jax.parameters import split_model
from tests.conftest import tiny_config, tiny_model

EXPERTS = MoEConfig(5, 2, 16)


def test_loads_are_the_router_s_choices_as_multiples_of_an_even_share(corpus):
    model = tiny_model("*-GDN-*", vocab_size=corpus.tokenizer.get_vocab_size(), moe=EXPERTS, dense_layers=(False, True, False))
    model.layers[2].mlp.gate.kernel.set_value(jnp.zeros_like(model.layers[2].mlp.gate.kernel[...]))  # all alike: experts 0 and 1
    instrument = make_instrument("x", dict(instrument="experts", seq_len=16, rows=3, batch_size=2))
    instrument.check(model.config, corpus)
    found = {
        (m.measure, *dict(sorted(m.at.items())).values()): m.value
        for m in instrument.measure(Subject(model, corpus.tokenizer, corpus))
    }
    assert [found["load", expert, 2] for expert in range(5)] == [2.5, 2.5, 0, 0, 0] and found["busiest", 2] == 2.5
    loads = [found["load", expert, 0] for expert in range(5)]
    assert np.mean(loads) == pytest.approx(1) and found["busiest", 0] == max(loads) and max(loads) > 1.1
    assert found["unused",] == (3 + loads.count(0)) / 10 and found["busiest",] == 2.5
    assert sum(key[0] == "load" for key in found) == 10


def test_choices_are_those_of_the_mlp_s_input_and_padding_makes_none():
    model = tiny_model("*", moe=EXPERTS)
    (layer,), ids = model.layers, np.random.default_rng(0).integers(0, 61, (1, 9))
    segments = jnp.array([[1] * 7 + [0] * 2])
    hidden, at = model.inputs(ids, segments)
    x = hidden + layer.self_attn(layer.input_layernorm(hidden), **at)[0]
    scores = np.asarray(layer.post_attention_layernorm(x) @ layer.mlp.gate.kernel[...])[0, :7]
    want = np.bincount(np.argsort(-scores, axis=-1)[:, :2].reshape(-1), minlength=5)
    structure, parameters = split_model(model)
    batch = {"input_ids": jnp.asarray(ids), "segment_ids": segments, "positions": at["positions"]}
    assert _choices(structure, parameters, batch)[0, 0].tolist() == want.tolist()


def test_a_model_without_experts_is_refused_before_any_work(corpus):
    instrument = make_instrument("x", dict(instrument="experts"))
    with pytest.raises(ValueError, match="experts: the model has no experts"):
        instrument.check(tiny_config("*"), corpus)
    with pytest.raises(ValueError, match="experts: the model has no experts"):
        instrument.check(tiny_config("*", moe=EXPERTS, dense_layers=(True,)), corpus)
    with pytest.raises(ValueError, match="experts: no source is named 'poems'"):
        make_instrument("x", dict(instrument="experts", source="poems", seq_len=16)).check(tiny_config("*", moe=EXPERTS), corpus)
