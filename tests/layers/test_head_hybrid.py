"""Heads of attention beside a recurrent mixer: both merges, the cache of the kept heads, and conversion from attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import GDNConfig, GKAConfig, HeadHybridConfig, Mamba2Config, Mamba3Config
from hybrid_jax.convert import load_model, save_model
from hybrid_jax.memory import state_bytes_by_kind
from hybrid_jax.parameters import split_model
from hybrid_jax.priming.initialize import initialize_hybrid
from tests.conftest import relative_error, tiny_config, tiny_model

IDS = np.random.default_rng(0).integers(0, 61, (2, 21))
SUM = HeadHybridConfig(merge="sum")
HEADS = [(0,), (1, 2, 3), (0, 1, 2, 3)]  # of 4 heads over 2 key-value heads: one group, unequal groups, all


@functools.cache
def source(**changes):
    return tiny_model("*-*", **changes)


def converted(pattern, *options, **changes):
    model = source(**changes)
    model = nnx.merge(*nnx.split(model))
    model.config = model.config.with_options(*options)
    return initialize_hybrid(model, pattern, seed=3)


def on_layer(model, x):
    """The first layer's mixer on x."""
    at = dict(positions=jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), segment_ids=jnp.ones(x.shape[:2], jnp.int32))
    layer = model.layers[0]
    return lambda mixer: np.asarray(mixer(x, **at)[0], np.float64), layer.mixer(layer.spec.kind)


@pytest.mark.parametrize("heads", HEADS)
def test_kept_heads_compute_what_they_compute_in_the_source(heads):
    model, x = converted(f"GDN[{','.join(map(str, heads))}]-*", o_bias=True), jax.random.normal(jax.random.key(0), (2, 9, 24))
    run, mixer = on_layer(model, x)
    attention = source(o_bias=True).layers[0].self_attn
    kernel, others = attention.o_proj.kernel[...], [h for h in range(4) if h not in heads]
    only = nnx.merge(*nnx.split(attention))
    only.o_proj.kernel.set_value(kernel.reshape(4, 8, 24).at[jnp.array(others, int)].set(0).reshape(32, 24))
    assert relative_error(run(mixer.attention), run(only)) < 1e-5


def test_the_published_merge_is_its_formula():
    model, x = converted("M2[1,2]-*"), jax.random.normal(jax.random.key(0), (2, 9, 24))
    run, mixer = on_layer(model, x)
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(24, 24)), rng.normal(size=24)
    mixer.merge.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    mixer.merge.bias.set_value(jnp.asarray(bias, jnp.float32))
    y, a = run(mixer.recurrent), run(mixer.attention)
    a = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
    a = a * y.std(-1, keepdims=True) + y.mean(-1, keepdims=True)
    assert relative_error(run(mixer), (y + a @ kernel + bias) / 2) < 1e-5


def test_the_sum_begins_with_every_head_once():
    """With all heads kept the recurrent mixer adds nothing, and the hybrid is the source; with one, its rows alone are 0."""
    want = source()(IDS)
    assert relative_error(converted("GKA[0,1,2,3]-M3[0,1,2,3]", SUM)(IDS), want) < 1e-5
    biased = source(o_bias=True)  # B'MOJO has a bias too, which must not count twice
    for layer in biased.layers:
        layer.self_attn.o_proj.bias.set_value(jnp.full(24, 0.5))
    assert relative_error(converted("BMF[0,1,2,3]-*", SUM, o_bias=True)(IDS), biased(IDS)) < 1e-5
    mixer = converted("GKA[2]-*", SUM).layers[0].gka
    assert mixer.merge is None
    rows = np.abs(np.asarray(mixer.recurrent.o_proj.kernel[...]).reshape(4, 8, 24)).max((1, 2))
    assert rows[2] == 0 and (rows[[0, 1, 3]] > 0).all()


def test_a_silent_recurrent_mixer_has_finite_gradients():
    """The published merge divides by nothing that may be 0, and its deviation has a gradient at 0."""
    model = tiny_model("GDN[0]")
    model.layers[0].gdn.recurrent.o_proj.kernel.set_value(jnp.zeros((32, 24)))
    grads = jax.tree.leaves(nnx.grad(lambda m: jnp.sum(jnp.sin(m(IDS))))(model))
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize("heads, kv_heads", [((0,), 1), ((0, 1), 1), ((1, 2, 3), 2)])
def test_a_cache_holds_the_kept_heads_keys_and_values_only(heads, kv_heads):
    config = tiny_config(f"GDN[{','.join(map(str, heads))}]-*-GDN")
    grown = {k: n - state_bytes_by_kind(config, 64)[k] for k, n in state_bytes_by_kind(config, 128).items()}
    slots = 64 * 2 * 4  # 64 positions and segments, int32
    assert grown == {"kept heads": 64 * 2 * kv_heads * 8 * 2 + slots, "*": 64 * 2 * 2 * 8 * 2 + slots, "GDN": 0}


@pytest.mark.parametrize("merge", ["standardized", "sum"])
def test_an_export_is_loaded_again_with_its_heads_and_merge(merge, tmp_path):
    model = converted("GDN[1,2,3]-M2[0]", HeadHybridConfig(merge))
    save_model(model, tmp_path / "out", tokenizer_from=False)
    again = load_model(tmp_path / "out")
    assert again.config == model.config and again.config.options(HeadHybridConfig).merge == merge
    got, want = split_model(again)[1], split_model(model)[1]
    assert got.keys() == want.keys() and all(np.array_equal(got[n], want[n]) for n in want)


def test_only_attention_becomes_a_hybrid_of_heads():
    model = converted("GDN-GDN[1]")
    assert initialize_hybrid(model, "GDN-GDN[1]").config.pattern == "GDN-GDN[1]"
    for pattern in ("GDN[1]-GDN[1]", "GDN-GDN[2]", "GDN-GDN"):
        with pytest.raises(ValueError, match="only attention can become"):
            initialize_hybrid(model, pattern)
    fused = converted("GDN[1]*-*")
    for pattern in ("GDN[2]-*", "GDN[1,2]*-*", "GDN-*"):
        with pytest.raises(ValueError, match=r"layer 0 is 'GDN\[1\]\*': its mixer keeps its heads"):
            initialize_hybrid(fused, pattern)


def test_a_fused_layer_teaches_with_all_heads():
    config = tiny_config("GDN[1]*-*")
    assert config.unfused().pattern == "GDN[1]-*" and config.teacher().pattern == "*-*"
    names = split_model(tiny_model("GDN[1]*"))[1]
    assert names["layers.0.self_attn.q_proj.kernel"].shape == (24, 32)
    assert names["layers.0.gdn.attention.q_proj.kernel"].shape == (24, 8)


def test_the_merge_counts_only_where_heads_are_kept():
    published, ours = (dataclasses.replace(tiny_config("GDN-*"), mixers=m) for m in ((), (SUM,)))
    assert HeadHybridConfig not in published.used_options()
    assert HeadHybridConfig in ours.with_pattern("GDN[0]-*").used_options()


SMALL = {
    "GKA": GKAConfig(state_size=3),
    "GDN": GDNConfig(state_size=3),
    "M2": Mamba2Config(state_size=3),
    "M3": Mamba3Config(state_size=4),
}


@pytest.mark.parametrize("symbol", SMALL)
def test_a_state_smaller_than_the_head_is_drawn_anew_where_attention_does_not_fit(symbol, tmp_path):
    """Values, gate and output come from attention; keys and queries do not. It is exported with its size and loaded again."""
    model = converted(f"{symbol}[1]-*", SMALL[symbol])
    small = state_bytes_by_kind(model.config, 64)[symbol]
    assert small < state_bytes_by_kind(tiny_config(f"{symbol}-*"), 64)[symbol]
    attention = {n.removeprefix("layers.0.self_attn."): x for n, x in split_model(source())[1].items() if "layers.0.self_attn" in n}
    mixer = {n.removeprefix("layers.0."): x for n, x in split_model(model)[1].items() if n.startswith("layers.0.")}
    output = next(x for n, x in mixer.items() if n.endswith((".recurrent.o_proj.kernel", ".recurrent.out_proj.kernel")))
    assert np.array_equal(output, attention["o_proj.kernel"])
    kernel = next((x for n, x in mixer.items() if n.endswith(".recurrent.in_proj.kernel")), None)
    value = kernel[:, 32:48] if kernel is not None else next(x for n, x in mixer.items() if n.endswith("recurrent.v_proj.kernel"))
    assert np.array_equal(value, attention["v_proj.kernel"])
    assert np.isfinite(np.asarray(model(IDS))).all()
    save_model(model, tmp_path / "out", tokenizer_from=False)
    assert load_model(tmp_path / "out").config == model.config
