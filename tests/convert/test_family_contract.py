"""What a source family does beside its logits: caches, packed rows, exports of the source and of hybrids, conversion, meshes."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hybrid_jax import load_model, save_model
from hybrid_jax.parameters import split_model
from hybrid_jax.plan.attentions import attentions
from hybrid_jax.priming.fuse import fuse
from tests.conftest import cpu_devices, relative_error
from tests.convert.test_transformers_parity import make, run

torch = pytest.importorskip("torch")

PHI = "phi normed queries and keys"
LONG = "phi3 long documents of longrope, windowed"
# Of each family the case with the most options.
FAMILIES = [
    "smollm3 untied, biased, windows in layers without rope",
    PHI,
    "phi3 windowed, part of the head rotated",
    "mixtral windowed, tied, one key head",
    "olmo3 windowed, tied, two ropes",
    "llama4 chunks, a dense layer, a layer without rope, biased",
    "gemma2 windowed, soft-capped",
    "gemma3 untied, windowed, biased, soft-capped, two ropes",
]
MESHED = [*FAMILIES, LONG]
USUAL = ("phi3 windowed, part of the head rotated", "gemma3 untied, windowed, biased, soft-capped, two ropes")
# Conversion of every family takes a minute: but for two of them, with -m long. Phi has a test of its own, without a forward pass.
MIXED = [pytest.param(case, marks=[] if case in USUAL else pytest.mark.long) for case in FAMILIES if case != PHI]
IDS = np.random.default_rng(1).integers(4, 97, (2, 31))


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    """(transformers' model, its directory)."""
    path = tmp_path_factory.mktemp("family") / "hf"
    theirs = make(request.param)
    theirs.save_pretrained(path)
    return theirs, path


def logits_of(theirs, ids):
    with torch.no_grad():
        return theirs(torch.from_numpy(np.asarray(ids))).logits.numpy()


@nnx.jit
def part_of(model, ids, positions, state):
    hidden, state = model.hidden_states(ids, None, positions, state)
    return model.head(hidden), state


def decoded(model, ids, prefill):
    """The logits of a prefill and of one token after the other."""
    state, parts = model.init_state(len(ids), ids.shape[1]), []
    bounds = [0, *range(prefill, ids.shape[1] + 1)]
    for a, b in zip(bounds, bounds[1:], strict=False):
        logits, state = part_of(model, ids[:, a:b], jnp.broadcast_to(jnp.arange(a, b), (len(ids), b - a)), state)
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)


def test_decoding_with_a_cache_equals_transformers(source):
    theirs, path = source
    assert relative_error(decoded(load_model(path), IDS, 11), logits_of(theirs, IDS)) < 1e-5


def test_packed_documents_equal_transformers_on_each_of_them(source):
    theirs, path = source
    segments = np.tile(np.repeat([1, 2], [12, 19]), (2, 1))
    packed = nnx.jit(lambda m, ids, segments: m(ids, segments))(load_model(path), IDS, segments)
    for a, b in ((0, 12), (12, 31)):
        assert relative_error(packed[:, a:b], logits_of(theirs, IDS[:, a:b])) < 1e-5


def test_the_export_has_the_source_s_tensors_and_keys(source, tmp_path):
    theirs, path = source
    save_model(load_model(path), tmp_path / "ours")
    want, got = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "ours"))
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[name], got[name]) and want[name].shape == got[name].shape for name in want)
    keys, written = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / "ours"))
    del keys["transformers_version"]
    kept = {name: value for name, value in keys.items() if value is not None}  # null stands for a value, which may be written
    assert {name: written.get(name) for name in kept} == kept
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    assert np.array_equal(logits_of(again.eval(), IDS), logits_of(theirs, IDS))


@pytest.mark.parametrize("source", MIXED, indirect=True)
@pytest.mark.parametrize("pattern", ["GKA-*-M2", "M3-BMF-GDN"])
def test_layers_become_mixers_and_the_hybrid_is_exported_and_loaded(source, pattern, tmp_path):
    theirs, path = source
    if load_model(path).config.attention_soft_cap is not None:
        with pytest.raises(ValueError, match="layer 1: 'BMF' has no soft cap of attention scores, which gemma2 has"):
            load_model(path, pattern="*-BMF-*")
        pattern = pattern.replace("BMF", "SWA")
    hybrid = load_model(path, pattern=pattern)
    save_model(hybrid, tmp_path / "hybrid")
    written = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert written["model_type"] == f"hybrid_{theirs.config.model_type}"
    again, want = load_model(tmp_path / "hybrid"), run(hybrid, IDS)
    assert again.config == hybrid.config and np.array_equal(run(again, IDS), want)
    assert np.isfinite(want).all() and relative_error(decoded(hybrid, IDS, 30), want) < 1e-4


def test_a_window_as_long_as_the_text_in_place_of_attention_changes_nothing(source):
    theirs, path = source
    windows = [w is None for w in load_model(path).config.attention_windows]
    hybrid = load_model(path, pattern="-".join("SWA" if full else "*" for full in windows))
    assert relative_error(run(hybrid, IDS), logits_of(theirs, IDS)) < 1e-5


@pytest.mark.parametrize("case", [case for case in MESHED if case != PHI])
def test_mixing_matrices_times_values_are_what_attention_gives_its_output_projection(case, tmp_path):
    make(case).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    segments = jnp.tile(jnp.repeat(jnp.array([1, 2]), jnp.array([12, 19])), (2, 1))
    hidden, at = model.inputs(IDS, segments)
    for layer in model.layers:
        attention, x = layer.self_attn, layer.mixer_input(hidden)
        mixing = attention.mixing(x, **at)
        mixed = jnp.einsum("bhts,bshd->bthd", mixing.matrix(), mixing.values).reshape(2, 31, -1)
        assert relative_error(attention.o_proj(mixed), attention(x, **at)[0]) < 1e-5


def test_sliding_windows_in_place_of_a_source_s_own_shorter_ones_do_not_show_it_more_tokens(tmp_path):
    """SWA's window is 2,048 by default, and the source's weights know no key beyond their own 7."""
    make("gemma2 windowed, soft-capped").save_pretrained(tmp_path)
    source, hybrid = load_model(tmp_path), load_model(tmp_path, pattern="SWA-SWA-*")
    assert [layer.swa.window for layer in hybrid.layers[:2]] == [7, 2048]
    assert [attention.window for attention in attentions(hybrid.config, hybrid.config.layers)] == [7, 2048, 7]
    assert relative_error(run(hybrid, IDS), run(source, IDS)) < 1e-6


def test_soft_caps_that_bmojo_has_not_are_refused_in_teachers_too(tmp_path):
    make("gemma2 windowed, soft-capped").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 1: 'BMF>GKA' has no soft cap of attention scores"):
        load_model(tmp_path, pattern="*-BMF>GKA-*")


def test_a_mixer_s_norms_begin_with_what_gemma_s_norms_multiply_by(tmp_path):
    make("gemma3 tied, one key head, own query scale").save_pretrained(tmp_path)
    source = load_model(tmp_path)
    hybrid = load_model(tmp_path, pattern="M2-M3-*")
    for i, mixer, names in ((0, "mamba", "Cq Bk"), (1, "mamba3", "Cq Bk")):
        for ours, theirs in names.split():
            got = getattr(getattr(hybrid.layers[i], mixer), f"{ours}_norm").weight[...]
            assert relative_error(got, 1 + getattr(source.layers[i].self_attn, f"{theirs}_norm").weight[...]) < 1e-6


MESHES = """
import sys
import jax
import numpy as np
from flax import nnx
from hybrid_jax import load_model
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.head import Head
from hybrid_jax.parallel.sequence import to_zigzag
from tests.conftest import relative_error

ids = np.random.default_rng(0).integers(4, 96, (2, 32))
positions = np.tile(np.arange(32), (2, 1))
step = nnx.jit(lambda m, ids, segments, positions: m(ids, segments, positions))
wanted = {path: step(load_model(path), ids, np.ones_like(ids), positions) for path in sys.argv[1:]}
for sizes in ({"seq": 4, "tensor": 2}, {"fsdp": 2, "tensor": 2, "seq": 2}):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    for path, want in wanted.items():
        order = lambda x: to_zigzag(jax.numpy.asarray(x), sizes["seq"])
        model = load_model(path, mesh=mesh)
        with jax.set_mesh(mesh):
            got = step(model, order(ids), order(np.ones_like(ids)), order(positions))
        assert relative_error(got, order(want)) < 1e-5, (sizes, path, relative_error(got, order(want)))
hidden, kernel, bias = (np.random.default_rng(1).normal(size=s).astype(np.float32) for s in ((2, 16, 8), (8, 12), (12,)))
loss = jax.jit(jax.value_and_grad(lambda k, b: cross_entropy(hidden, Head(k, bias=b), ids[:, :16] % 12).sum(), argnums=(0, 1)))
want = loss(kernel, bias)
with jax.set_mesh(mesh):
    got = loss(kernel, bias)
assert all(relative_error(a, b) < 1e-5 for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)), "a biased head"
print("passed")
"""


def test_on_meshes_that_shard_tokens_and_heads_the_logits_are_those_of_one_device(tmp_path):
    for n, case in enumerate(MESHED):
        theirs = make(case, vocab_size=96, num_key_value_heads=2)
        theirs.save_pretrained(tmp_path / str(n))
    command = [sys.executable, "-c", MESHES, *(str(tmp_path / str(n)) for n in range(len(MESHED)))]
    done = subprocess.run(command, env=cpu_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-2000:]


def test_layers_of_phi_become_mixers_whose_parameters_are_exported_and_loaded(tmp_path):
    make(PHI).save_pretrained(tmp_path / "source")
    hybrid = load_model(tmp_path / "source", pattern="GKA-BMF-GDN[1]")
    save_model(hybrid, tmp_path / "hybrid")
    again = load_model(tmp_path / "hybrid")
    want, got = (split_model(model)[1] for model in (hybrid, again))
    assert again.config == hybrid.config and want.keys() == got.keys()
    assert all(np.array_equal(want[name], got[name]) for name in want)
    names = load_file(tmp_path / "hybrid" / "model.safetensors").keys()
    assert {"model.layers.0.mlp.fc1.bias", "model.layers.1.bmojo_f.bmojo_attn.q_norm.bias", "lm_head.bias"} <= names


def test_both_streams_of_a_fused_phi_run_its_parallel_block(tmp_path):
    """Of each stream the mixer's and the MLP's outputs are added to the layer's input, and the MLP reads that input's norm."""
    theirs = make(PHI)
    theirs.save_pretrained(tmp_path)
    source, hybrid = load_model(tmp_path), load_model(tmp_path, pattern="SWA-*-SWA")  # windows longer than the text
    streams = nnx.jit(lambda m, ids: m.two_streams(ids))(fuse(hybrid, source), IDS)
    for stream in (streams.teacher, streams.student):
        assert relative_error(source.head(stream), logits_of(theirs, IDS)) < 1e-5
    x, first = source.inputs(IDS)[0], source.layers[0]
    for out in streams.layers[0]:
        assert relative_error(out.hidden, x + out.mixer + out.mlp) < 1e-6
        assert relative_error(out.mlp, first.mlp(first.input_layernorm(x))) < 1e-5


def test_mixers_begin_with_what_a_layer_norm_of_each_head_makes_of_queries_but_for_its_bias(tmp_path):
    make(PHI).save_pretrained(tmp_path)
    source, hybrid = load_model(tmp_path), load_model(tmp_path, pattern="GDN-M2-M3")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 48)), jnp.float32)

    def queries(i):
        attention = source.layers[i].self_attn
        heads = attention.q_norm((x @ attention.q_proj.kernel[...]).reshape(1, 5, 6, 8))
        return heads - attention.q_norm.bias[...]

    def directions(heads):
        return heads / jnp.linalg.norm(heads, axis=-1, keepdims=True)

    gdn, mamba2, mamba3 = hybrid.layers[0].gdn, hybrid.layers[1].mamba, hybrid.layers[2].mamba3
    weight, begin = source.layers[0].self_attn.q_norm.weight[...], 48 + 16 + 16  # z, x and B come before C
    assert relative_error(directions(gdn.q_proj(x).reshape(1, 5, 6, 8)), directions(queries(0) / weight)) < 1e-5
    for i, mixer in ((1, mamba2), (2, mamba3)):
        found = mixer.C_norm(mixer.in_proj(x)[..., begin : begin + 48].reshape(1, 5, 6, 8))
        assert relative_error(directions(found), directions(queries(i))) < 1e-5


def test_each_packed_document_takes_the_frequencies_of_longrope_that_its_length_asks_for(tmp_path):
    """The original context has 12 tokens; ids of segments need not rise."""
    theirs = make(LONG)
    theirs.save_pretrained(tmp_path)
    segments = np.tile(np.repeat([7, 2, 40], [12, 13, 6]), (2, 1))
    packed = nnx.jit(lambda m, ids, segments: m(ids, segments))(load_model(tmp_path), IDS, segments)
    for a, b in ((0, 12), (12, 25), (25, 31)):
        assert relative_error(packed[:, a:b], logits_of(theirs, IDS[:, a:b])) < 1e-5


def test_longrope_is_decoded_within_its_original_context_and_refused_beyond(tmp_path):
    theirs = make(LONG)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert relative_error(decoded(model, IDS[:, :12], 5), logits_of(theirs, IDS[:, :12])) < 1e-5
    with pytest.raises(ValueError, match="longrope: .* beyond original_max_position_embeddings, 12 tokens.* give at most 12"):
        model.init_state(1, 13)
    load_model(tmp_path, pattern="GKA-GDN-M2").init_state(1, 13)


def test_some_heads_of_a_source_that_norms_all_heads_together_are_refused(tmp_path):
    make("olmo3 windowed, tied, two ropes").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer 1: 'GDN\[2\]' keeps some heads, and olmo3 norms queries and keys over all heads"):
        load_model(tmp_path, pattern="*-GDN[2]-*")


def test_mixers_begin_with_the_directions_of_queries_that_a_norm_over_all_heads_gives(tmp_path):
    """Behind a norm of each head, GDN's and Mamba-3's queries are attention's, and Mamba-2 norms as attention does."""
    make("olmo3 windowed, tied, two ropes").save_pretrained(tmp_path)
    source, hybrid = load_model(tmp_path), load_model(tmp_path, pattern="GDN-M2-M3")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 48)), jnp.float32)

    def directions(queries):
        heads = queries.reshape(1, 5, 6, 8)
        return heads / jnp.linalg.norm(heads, axis=-1, keepdims=True)

    def attention(i):
        return source.layers[i].self_attn.q_norm(source.layers[i].self_attn.q_proj(x))

    gdn, mamba2, mamba3 = hybrid.layers[0].gdn, hybrid.layers[1].mamba, hybrid.layers[2].mamba3
    assert relative_error(directions(gdn.q_proj(x)), directions(attention(0))) < 1e-5
    begin = 48 + 16 + 16  # z, x and B come before C
    assert relative_error(mamba2.C_norm(mamba2.in_proj(x)[..., begin : begin + 48]), attention(1)) < 1e-4
    assert relative_error(directions(mamba3.in_proj(x)[..., begin : begin + 48]), directions(attention(2))) < 1e-5
