"""Gated DeltaNet becomes Gated KalmaNet: what is copied and what is drawn, options, an exact relation, streams, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hybrid_jax import load_model, save_model
from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.convert import convert_directory
from hybrid_jax.data.layout import training_batch
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.plan.program import Job
from hybrid_jax.priming.fuse import check_teacher, fuse, unfuse
from hybrid_jax.priming.initialize import check_convertible, initialize_hybrid
from hybrid_jax.train.objectives import align
from tests.conftest import relative_error, tiny_config, tiny_model

IDS = np.random.default_rng(0).integers(0, 61, (2, 12))
SEGMENTS = np.tile(np.repeat([1, 2], [5, 7]), (2, 1))
# every option that is taken over, none at its default
OPTIONS = GDNConfig(conv_size=3, norm_eps=1e-3, use_gate=False, state_size=5, kv_proj_rank=2, kv_learnable_residual=True)
RENAMED = {"a_proj.kernel": "gk_proj.kernel"}
DRAWN = {"alpha_proj.kernel", "alpha_proj.bias", "b_proj.bias"}
run = nnx.jit(lambda model, ids, segments: model(ids, segments))


def mixer_of(model, layer, kind):
    prefix = f"layers.{layer}.{kind}."
    return {n.removeprefix(prefix): np.asarray(x) for n, x in split_model(model)[1].items() if n.startswith(prefix)}


@pytest.mark.parametrize("gdn", [GDNConfig(), OPTIONS])
def test_every_parameter_is_that_of_the_deltanet_but_the_gates_that_it_has_not(gdn):
    source = tiny_model("GDN-*-GDN", gdn=gdn)
    hybrid = initialize_hybrid(source, "GKA-*-GDN")
    have, got = mixer_of(source, 0, "gdn"), mixer_of(hybrid, 0, "gka")
    assert got.keys() - DRAWN == {n for n in got if RENAMED.get(n, n) in have} and len(got) - 3 == len(have)
    assert all(np.array_equal(got[n], have[RENAMED.get(n, n)]) for n in got.keys() - DRAWN)
    assert got["alpha_proj.kernel"].std() > 0.1 and not got["alpha_proj.bias"].any() and not got["b_proj.bias"].any()
    kept = mixer_of(hybrid, 2, "gdn")
    assert all(np.array_equal(x, kept[n]) for n, x in mixer_of(source, 2, "gdn").items())
    fresh = mixer_of(initialize_hybrid(source, "GKA-*-GDN", copy_attention=False), 0, "gka")
    assert not np.array_equal(fresh["q_proj.kernel"], got["q_proj.kernel"])


def test_options_are_those_of_the_deltanet_and_others_the_gated_kalmanet_s_own():
    config = tiny_config("GDN-*", gdn=OPTIONS, gka=GKAConfig(num_iter=7)).with_pattern("GKA-*")
    taken = dict(conv_size=3, norm_eps=1e-3, use_gate=False, state_size=5, kv_proj_rank=2, kv_learnable_residual=True)
    assert config.options(GKAConfig) == GKAConfig(num_iter=7, **taken) and config.options(GDNConfig) == OPTIONS
    assert tiny_config("*-*", gdn=OPTIONS).with_pattern("GKA-*").options(GKAConfig).conv_size == 4  # attention has no options


@pytest.mark.parametrize("num_iter", [0, 30])
def test_where_each_token_forgets_all_before_it_the_two_mixers_are_one(num_iter):
    """Both then read k.q times v, with factors that the norm of the output takes off; so it is with each document's first token."""
    source = tiny_model("GDN-*-GDN", gdn=GDNConfig(norm_eps=1e-20), gka=GKAConfig(num_iter=num_iter))
    remembering = run(initialize_hybrid(source, "GKA-*-GKA"), IDS, SEGMENTS)
    want = run(source, IDS, SEGMENTS)
    assert relative_error(remembering[:, 0], want[:, 0]) < 1e-4 and relative_error(remembering[:, 5], want[:, 5]) < 1e-4
    assert relative_error(remembering[:, 4], want[:, 4]) > 1e-2
    for i in (0, 2):
        source.layers[i].gdn.A_log.set_value(jnp.full(4, 12.0))
    forgetting = run(initialize_hybrid(source, "GKA-*-GKA"), IDS, SEGMENTS)
    assert relative_error(forgetting, run(source, IDS, SEGMENTS)) < 1e-4


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_streamed_conversion_writes_what_a_loaded_model_would(dtype, tmp_path):
    save_model(tiny_model("GDN-*-GDN", gdn=OPTIONS), tmp_path / "source")
    config = convert_directory(tmp_path / "source", tmp_path / "a", lambda c: c.with_pattern("GKA-M2-GDN"), dtype=dtype, seed=3)
    model = load_model(tmp_path / "source", "GKA-M2-GDN", dtype, seed=3)
    save_model(model, tmp_path / "b")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert config == model.config == load_model(tmp_path / "a").config
    assert a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_alignment_learns_from_the_deltanet(tmp_path):
    """Both streams: the source as it is, and the hybrid; the fused model is exported and comes back."""
    source = tiny_model("GDN-*", gdn=OPTIONS)
    student = initialize_hybrid(source, "GKA-*")
    fused = fuse(student, source)
    assert fused.config.pattern == "GDN>GKA-*DA" and fused.config.teacher() == source.config.with_options(*student.config.mixers)
    check_teacher(fused.config, source.config)
    streams = nnx.jit(lambda model, ids: model.two_streams(ids, compare=lambda *both: None))(fused, IDS)
    ones = np.ones_like(IDS)
    for got, model in ((streams.teacher, source), (streams.student, student)):
        assert relative_error(fused.head(got), run(model, IDS, ones)) < 1e-5
    batch = training_batch({"input_ids": IDS.astype(np.int32), "segment_ids": ones, "loss_weights": ones.astype(np.float32)})
    structure, parameters = split_model(fused)
    grads = jax.jit(jax.grad(lambda p: align(join_model(structure, p), batch, target="mixer").loss.value))(parameters)
    assert all(np.abs(grads[f"layers.0.gka.{n}.kernel"]).max() > 0 for n in ("q_proj", "proj_v.linearB", "alpha_proj"))
    save_model(fused, tmp_path / "fused")
    again = load_model(tmp_path / "fused")
    assert again.config == fused.config and unfuse(again).config == student.config
    job = Job(student.config, "align", 16, 2, source=source.config)
    assert job.model_config == fused.config


@pytest.mark.parametrize(
    "gdn, gka, words",
    [
        (GDNConfig(conv_bias=True), {}, "gdn_config.conv_bias = True: gka_config has no such option, so only a mixer with False"),
        (GDNConfig(use_short_conv=False), {}, "gdn_config.use_short_conv = False: .* only a mixer with True"),
        (GDNConfig(allow_neg_eigval=True), {}, "gdn_config.allow_neg_eigval = True: .* only a mixer with False"),
        (GDNConfig(), dict(conv_size=3), "gka_config.conv_size = 3 contradicts gdn_config.conv_size = 4"),
        (GDNConfig(), dict(use_gate=False), "gka_config.use_gate = False contradicts gdn_config.use_gate = True"),
    ],
)
def test_options_that_cannot_be_taken_over_are_refused_by_name(gdn, gka, words):
    with pytest.raises(ValueError, match=words):
        tiny_config("GDN-*", gdn=gdn, gka=GKAConfig(**gka)).with_pattern("GKA-*")


@pytest.mark.parametrize("name", ["use_v_conv", "use_beta_gate", "use_forgetting_gate"])
def test_an_option_that_would_leave_out_a_part_of_the_deltanet_is_refused(name):
    with pytest.raises(ValueError, match=f"gka_config.{name} = False would leave out a part"):
        tiny_config("GDN-*", gka=GKAConfig(**{name: False})).with_pattern("GKA-*")


def test_options_of_layers_that_are_gated_kalmanet_already_do_not_change():
    with pytest.raises(ValueError, match="gka_config.conv_size = 4 contradicts gdn_config.conv_size = 3"):
        tiny_config("GKA-GDN", gdn=GDNConfig(conv_size=3, norm_eps=1e-6)).with_pattern("GKA-GKA")
    same = tiny_config("GKA-GDN", gdn=GDNConfig(norm_eps=1e-6))
    assert same.with_pattern("GKA-GKA").options(GKAConfig) == same.options(GKAConfig)


@pytest.mark.parametrize("have, wanted", [("GDN", "M2"), ("GKA", "GDN"), ("GDN[1]", "GKA"), ("GDN", "GKA[1]"), ("GDN", "GKA*")])
def test_pairs_without_a_copy_are_refused_with_those_that_there_are(have, wanted):
    config = tiny_config(f"{have}-*")
    with pytest.raises(ValueError, match="layer 0 is .*: only attention can become .*; among mixers there is GDN to GKA"):
        check_convertible(config, config.with_pattern(f"{wanted}-*"))
    check_convertible(tiny_config("GDN-*"), tiny_config("GDN-*").with_pattern("GDN>GKA-*"))
