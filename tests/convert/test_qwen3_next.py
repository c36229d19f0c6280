"""Qwen3-Next beside its logits: packed tensors, caches, packed rows, exports, conversion of its attention, and what is refused."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import main
from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.convert.load import read_model_config
from hybrid_jax.convert.quantized import Groups
from hybrid_jax.convert.save import quantized_tensors
from hybrid_jax.evaluate.instruments.heads import Heads
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.families.public import PUBLIC
from hybrid_jax.generation import generate
from hybrid_jax.layers.gdn import GatedDeltaNet
from hybrid_jax.layers.head_hybrid import HeadHybrid
from hybrid_jax.parameters import split_model
from hybrid_jax.priming.fuse import check_teacher, fuse
from hybrid_jax.priming.initialize import check_convertible
from tests.conftest import cpu_devices, relative_error
from tests.convert.test_family_contract import MESHES, decoded, logits_of
from tests.convert.test_transformers_parity import make

torch = pytest.importorskip("torch")

NEXT = "qwen3 next"  # its layers: GDN-*
IDS = np.random.default_rng(1).integers(4, 97, (2, 31))
SEGMENTS = np.tile(np.repeat([1, 2], [12, 19]), (2, 1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(transformers' model, its directory)."""
    path = tmp_path_factory.mktemp("next") / "hf"
    theirs = make(NEXT)
    theirs.save_pretrained(path)
    return theirs, path


def test_it_is_no_hybrid_and_its_layers_are_gated_deltanet_and_attention(source):
    config = read_model_config(source[1])
    assert config.pattern == "GDN-*" and not config.is_hybrid
    gdn = config.options(GDNConfig)
    assert (gdn.key_heads, gdn.value_heads, gdn.state_size, gdn.value_size) == (2, 6, 8, 4)


def test_decoding_with_caches_and_states_equals_transformers(source):
    theirs, path = source
    assert relative_error(decoded(load_model(path), IDS, 11), logits_of(theirs, IDS)) < 3e-5


@pytest.mark.parametrize("case", ["qwen3 next, odd heads, a dense layer, tied", "qwen3.5 text"])
def test_the_export_has_the_source_s_tensors_and_keys(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "hf")
    save_model(load_model(tmp_path / "hf"), tmp_path / "ours")
    want, got = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "ours"))
    assert want.keys() == got.keys() and all(np.array_equal(want[name], got[name]) for name in want)
    keys, written = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "ours"))
    del keys["transformers_version"]
    assert {name: written.get(name) for name, x in keys.items() if x is not None} == {
        n: x for n, x in keys.items() if x is not None
    }
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
    assert relative_error(logits_of(again.eval(), IDS), logits_of(theirs, IDS)) < 1e-5  # torch rounds by the alignment in memory


def test_packed_documents_equal_transformers_on_each_of_them_also_where_windows_take_the_place_of_attention(source, tmp_path):
    """Windows as long as the text have attention's gate; the layer that is Gated DeltaNet stays; the hybrid is exported."""
    theirs, path = source
    have, hybrid = split_model(load_model(path))[1], load_model(path, pattern="GDN-SWA")
    assert hybrid.config.is_hybrid
    got = nnx.jit(lambda model, ids, segments: model(ids, segments))(hybrid, IDS, SEGMENTS)
    for a, b in ((0, 12), (12, 31)):
        assert relative_error(got[:, a:b], logits_of(theirs, IDS[:, a:b])) < 3e-5
    save_model(hybrid, tmp_path / "hybrid")
    again = load_model(tmp_path / "hybrid")
    assert again.config == hybrid.config
    found = {name.replace(".swa.", ".self_attn."): x for name, x in split_model(again)[1].items()}
    assert found.keys() == have.keys() and all(np.array_equal(found[name], have[name]) for name in have)


def fresh(mixer, config):
    """The shapes of a new mixer's parameters in layer 1, by name."""
    state = nnx.state(nnx.eval_shape(lambda: mixer(config, 1, rngs=nnx.Rngs(0))))
    return {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}


def attention_of(source):
    parameters = split_model(load_model(source[1]))[1]
    return {n.removeprefix("layers.1.self_attn."): x for n, x in parameters.items() if n.startswith("layers.1.self_attn.")}


def test_heads_that_stay_attention_keep_their_gates(source):
    config, attention = read_model_config(source[1]).with_pattern("GDN-GKA[1,4]"), attention_of(source)
    shapes = fresh(HeadHybrid, config)
    got = {n: x for n, x in HeadHybrid.from_attention(attention, zeros(shapes), config, 1).items() if n.startswith("attention.")}
    assert {n: x.shape for n, x in got.items()} == {n: x.shape for n, x in shapes.items() if n.startswith("attention.")}
    gates = attention["g_proj.kernel"].reshape(48, 6, 16)
    assert np.array_equal(got["attention.g_proj.kernel"], gates[:, jnp.array([1, 4])].reshape(48, 32))


def zeros(shapes):
    return {name: jnp.zeros(x.shape) for name, x in shapes.items()}


def test_a_gated_deltanet_with_heads_of_its_own_begins_with_attention_s_values_and_outputs(source):
    """6 heads of 16 channels become 24 value heads of 4; with keys as wide as attention's, queries and keys are copied too."""
    config, attention = read_model_config(source[1]), attention_of(source)
    for options, copied in (
        (GDNConfig(key_heads=6, value_heads=24, state_size=16, value_size=4), "gkoqv"),
        (GDNConfig(key_heads=12, value_heads=24, state_size=8, value_size=4), "gov"),  # as wide, of other heads
        (GDNConfig(key_heads=2, value_heads=6, state_size=16, value_size=4), ""),
    ):
        shapes = fresh(GatedDeltaNet, config.with_options(options))
        got = GatedDeltaNet.from_attention(attention, shapes, config.with_options(options), 1)
        assert {n: x.shape for n, x in got.items()} == {n: shapes[n].shape for n in (f"{x}_proj.kernel" for x in copied)}
        if "v" in copied:  # value head 4 h + j has channels 4 j ... 4 j + 3 of the values of query head h
            values = attention["v_proj.kernel"].reshape(48, 2, 16)
            assert np.array_equal(got["v_proj.kernel"].reshape(48, 24, 4)[:, 4 * 5 + 3], values[:, 1, 12:])


def test_tensors_of_multi_token_prediction_are_reported_and_left_out(source, tmp_path, capsys):
    tensors = load_file(source[1] / "model.safetensors")
    save_file({**tensors, "mtp.layers.0.input_layernorm.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source[1] / "config.json").read_text())
    load_model(tmp_path)
    assert "1 tensors are no part of the decoder and are not read, the first mtp.layers.0" in "".join(capsys.readouterr())


def test_the_published_config_is_read_and_written():
    config = config_from_hf(PUBLIC["Qwen/Qwen3-Next-80B-A3B-Instruct"])
    assert config.pattern == "-".join(["GDN-GDN-GDN-*"] * 12)
    assert config.rope.channels(config.head_dim) == 64 and config.moe is not None and config.moe.shared_intermediate_size == 512
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(layer_types=["linear_attention"]), "layer_types has 1 entries, num_hidden_layers is 2"),
        (dict(layer_types=["linear_attention", "chunked_attention"]), "layer 0: 'linear_attention' is not a known symbol"),
        (dict(linear_num_value_heads=5), r"value_heads \(5\) must be a multiple of key_heads \(2\)"),
        (dict(linear_num_key_heads=0), "linear_num_key_heads must be an integer at least 1"),
        (dict(decoder_sparse_step=0), "decoder_sparse_step must be an integer at least 1"),
        (dict(shared_expert_intermediate_size=0), "shared_expert_intermediate_size must be an integer at least 1"),
        (dict(hidden_act="gelu"), "hidden_act must be one of"),
        (dict(gdn_config={"use_gate": False}), "gdn_config.use_gate = False contradicts the other keys of config.json"),
        (dict(gdn_config={"state_size": 16}), "gdn_config.state_size = 16 contradicts the other keys .* it is 8"),
        (
            dict(hybrid_override_pattern="GDN[1]-*"),
            r"layer 0: 'GDN\[1\]' keeps some heads of attention, which has 6, and the mixer",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(source, keys, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf({**json.loads((source[1] / "config.json").read_text()), **keys})


def test_a_gated_deltanet_that_transformers_does_not_have_is_not_exported(source):
    config = read_model_config(source[1])
    other = config.with_options(dataclasses.replace(config.options(GDNConfig), allow_neg_eigval=True))
    with pytest.raises(ValueError, match="config.json of a qwen3_next cannot describe this model: mixers is"):
        config_to_hf(other)


def test_a_layer_that_is_gated_deltanet_already_becomes_gated_kalmanet_and_nothing_else(source):
    config = read_model_config(source[1])
    for pattern in ("M2-*", "*-*"):
        with pytest.raises(ValueError, match="layer 0 is 'GDN': only attention can become '.*'; among mixers there is GDN to GKA"):
            check_convertible(config, config.with_pattern(pattern))
    with pytest.raises(ValueError, match=r"keeps some heads of attention, which has 6, and the mixer has 6 of its own"):
        config.with_pattern("GKA[1]-*")


@pytest.mark.parametrize("case", [NEXT, "qwen3.5 text"])
def test_its_gated_deltanet_becomes_gated_kalmanet_from_file_to_file_and_generates(case, tmp_path):
    """Packed and alternating tensors become one per projection, of the same numbers; heads, sizes and taps are the source's."""
    make(case).save_pretrained(tmp_path / "hf")
    source = load_model(tmp_path / "hf")
    pattern, layer = source.config.pattern.replace("GDN", "GKA"), source.config.pattern.split("-").index("GDN")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "gka"), "--pattern", pattern]) == 0
    hybrid = load_model(tmp_path / "gka")
    have, got = source.layers[layer].gdn, hybrid.layers[layer].gka
    for ours in (*"qkvbgo", "a"):
        other = getattr(have, f"{'gk' if ours == 'a' else ours}_proj")
        assert np.array_equal(getattr(got, f"{ours}_proj").kernel[...], other.kernel[...]), ours
    for name in ("q_conv1d.kernel", "k_conv1d.kernel", "v_conv1d.kernel", "A_log", "dt_bias", "o_norm.weight"):
        want, found = (functools.reduce(getattr, name.split("."), mixer)[...] for mixer in (have, got))
        assert np.array_equal(found, want), name
    sizes = ("key_heads", "value_heads", "value_size", "state_size", "conv_size", "norm_eps", "use_gate")
    gdn, gka = (hybrid.config.options(cls) for cls in (GDNConfig, GKAConfig))
    assert [getattr(gka, n) for n in sizes] == [getattr(gdn, n) for n in sizes] and gdn == source.config.options(GDNConfig)
    want = logits(hybrid, IDS)
    assert relative_error(decoded(hybrid, IDS, 11), want) < 5e-4  # the solve's condition number lifts float32's rounding
    prompt = [int(x) for x in IDS[0, :9]]
    (new,) = generate(hybrid, [prompt], max_new_tokens=3)
    assert new[0] == int(np.argmax(logits(hybrid, IDS[:1, :9])[0, -1]))
    loaded = load_model(tmp_path / "hf", pattern=pattern)
    assert loaded.config == hybrid.config and np.array_equal(logits(loaded, IDS), want)


def logits(model, ids):
    return nnx.jit(lambda model, ids: model(ids))(model, ids)


@pytest.mark.parametrize(
    "keys", [dict(mlp_only_layers=[2]), dict(decoder_sparse_step=2), dict(decoder_sparse_step=2, mlp_only_layers=[0, 1])]
)
def test_dense_layers_are_transformers(keys, tmp_path):
    theirs = make("qwen3 next, odd heads, a dense layer, tied", **{"mlp_only_layers": [], **keys})
    theirs.config.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.dense_layers == tuple(type(layer.mlp).__name__ == "Qwen3NextMLP" for layer in theirs.model.layers)
    written = config_to_hf(config)
    assert {name: written[name] for name in keys} == keys and config_from_hf(written) == config


@pytest.mark.parametrize("case, of_gates", [(NEXT, "in_proj_ba"), ("qwen3.5 text", "in_proj_a")])
def test_gates_and_decays_of_a_mixer_with_heads_of_its_own_are_not_quantized(case, of_gates, tmp_path):
    make(case, hidden_size=64).config.save_pretrained(tmp_path)
    chosen, _ = quantized_tensors(read_model_config(tmp_path), Groups(bits=8))
    projections = [name for name in chosen if ".linear_attn.in_proj_" in name]
    assert projections and not any(of_gates in name for name in projections)


def test_layers_of_the_source_s_own_mixer_run_on_both_streams_of_a_fused_model(source):
    config = read_model_config(source[1])
    fused = config.with_pattern("GDN-GKA").fused()
    assert fused.pattern == "GDNDA-GKA*" and fused.with_pattern(fused.pattern) == fused and fused.unfused().pattern == "GDN-GKA"
    check_teacher(fused, config)
    converted = config.with_pattern("GKA-GKA").fused(config)
    assert converted.pattern == "GDN>GKA-GKA*" and converted.teacher() == config.with_options(*converted.mixers)
    check_teacher(converted, config)
    with pytest.raises(ValueError, match="layer 1 of the fused model is 'GDNDA': it learns from 'GDN', the source has '\\*' there"):
        check_teacher(config.with_pattern("GDN-GDN").fused(), config)


def test_instruments_of_heads_refuse_layers_with_other_numbers_of_heads(source):
    corpus: Any = None  # it is not read
    with pytest.raises(ValueError, match=r"heads: layer 0 \(GDN\) has 6 heads, attention 3"):
        Heads().check(dataclasses.replace(read_model_config(source[1]), num_heads=3, num_kv_heads=1), corpus)


@pytest.mark.long
def test_both_streams_of_a_fused_model_are_the_source_and_the_hybrid(source):
    teacher, student = load_model(source[1]), load_model(source[1], pattern="GDN-GKA")
    streams = nnx.jit(lambda model, ids: model.two_streams(ids, compare=lambda *both: None))(fuse(student, teacher), IDS)
    for got, model in ((streams.teacher, teacher), (streams.student, student)):
        assert relative_error(got, model.hidden_states(jnp.asarray(IDS))[0]) < 1e-4


@pytest.mark.long
def test_on_meshes_that_shard_tokens_and_heads_the_logits_are_those_of_one_device(tmp_path):
    make(NEXT, vocab_size=96).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path)], env=cpu_devices(8), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-2000:]
