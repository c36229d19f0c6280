"""The pieces of sequence parallelism by themselves, on one device: attention by parts, summaries, layouts, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax.config import Mamba3Config, MoEConfig
from hybrid_jax.data.layout import training_batch
from hybrid_jax.parallel import attention_block, cross_entropy, tiles
from hybrid_jax.parallel.attention import Part, attend, parts_attention
from hybrid_jax.parallel.attention_block import FULL, Mask
from hybrid_jax.parallel.mesh import abstract_mesh, check_mesh_fits, make_mesh, parse_mesh
from hybrid_jax.parallel.sequence import from_zigzag, positions_of, to_zigzag, zigzag_order
from hybrid_jax.parameters import abstract_parameters, join_model, logical_axes, split_model
from hybrid_jax.repeats import find_repeats
from hybrid_jax.stacking import stack, stacked_names, stacked_structure, training_repeats, unstack
from kernels_pallas import (
    gated_delta_rule,
    gated_delta_rule_summary,
    gated_kalmanet,
    gated_kalmanet_summary,
    linear_attention,
    linear_attention_summary,
)
from tests.conftest import relative_error, tiny_config, tiny_model
from tests.parallel.conftest import plain_attention, random, segments_of


@pytest.mark.parametrize("tile", [1024, 8])
@pytest.mark.parametrize("window, soft_cap", [(None, None), (5, None), (None, 0.7), (5, 0.7)])
def test_attention_and_its_gradient_are_the_definition_s_whatever_the_tile(monkeypatch, tile, window, soft_cap):
    monkeypatch.setattr(attention_block, "TILE", tile)
    q, k, v, do = random(2, 21, 4, 8), random(2, 21, 2, 8, seed=1), random(2, 21, 2, 8, seed=2), random(2, 21, 4, 8, seed=3)
    segments = segments_of(2, 21)
    got, pull = jax.vjp(lambda *x: attend(*x, segments, window, soft_cap=soft_cap), q, k, v)
    want, pull_want = jax.vjp(lambda *x: plain_attention(*x, segments, 0, window, soft_cap), q, k, v)
    for a, b in zip((got, *pull(do)), (want, *pull_want(do)), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("tile", [1024, 8])
def test_a_softmax_in_parts_is_the_softmax_of_the_whole(monkeypatch, tile):
    """Keys divided in two, the second seen only by some queries; one query sees nothing at all and gets zeros."""
    monkeypatch.setattr(attention_block, "TILE", tile)
    q, k, v = random(1, 12, 2, 8), random(1, 20, 2, 8, seed=1), random(1, 20, 2, 8, seed=2)
    q_seg = jnp.asarray([[1] * 6 + [2] * 5 + [9]], jnp.int32)
    k_seg = jnp.asarray([[1] * 12 + [2] * 8], jnp.int32)

    def in_parts(q, k, v):
        parts = tuple(Part(q, k[:, s], v[:, s], k_seg[:, s]) for s in (slice(0, 9), slice(9, 20)))
        return parts_attention(parts, q_seg, (FULL, FULL))

    def whole(q, k, v):
        return parts_attention((Part(q, k, v, k_seg),), q_seg, (FULL,))

    do = random(1, 12, 2, 8, seed=4)
    got, pull = jax.vjp(in_parts, q, k, v)
    want, pull_want = jax.vjp(whole, q, k, v)
    for a, b in zip((got, *pull(do)), (want, *pull_want(do)), strict=True):
        assert relative_error(a, b) < 1e-6
    assert not np.asarray(got[0, -1]).any()
    assert np.isfinite(np.asarray(pull(do)[0])).all()


def test_masks_count_from_the_offset():
    visible = Mask(nearest=2, window=4, offset=3).visible(jnp.arange(2), jnp.arange(5))
    assert visible.tolist() == [[True, True, False, False, False], [False, True, True, False, False]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_summary_does_to_a_state_what_the_tokens_do(packed):
    B, T, H, K, V, cut = 2, 19, 2, 4, 6, 11
    q, k, v = random(B, T, H, K), random(B, T, H, K, seed=1), random(B, T, H, V, seed=2)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -jax.random.uniform(jax.random.key(3), (B, T, H)), jax.random.uniform(jax.random.key(4), (B, T, H))
    segments = None
    if packed:
        segments = jnp.asarray([[1] * 5 + [2] * 14, [1] * 15 + [2] * 4], jnp.int32)
    start = random(B, H, K, V, seed=5)
    start_kk = jnp.einsum("bhkv,bhlv->bhkl", start, start)

    def check(op, summary, arrays, of_summary, initial):
        arrays, of_summary = ([x[:, :cut] for x in xs] for xs in (arrays, of_summary))
        ids = None if segments is None else segments[:, :cut]
        A, b = summary(*of_summary, segment_ids=ids)
        act = (lambda s: A @ s) if A.ndim == 4 else (lambda s: A[..., None, None] * s)
        got = jax.tree.map(lambda s, b: act(s) + b, initial, b)
        want = op(*arrays, initial_state=initial, segment_ids=ids)[1]
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative_error(x, y) < 1e-5

    check(linear_attention, linear_attention_summary, (q, k, v, g), (k, v, g), start)
    check(gated_delta_rule, gated_delta_rule_summary, (q, k, v, g, beta), (k, v, g, beta), start)
    check(gated_kalmanet, gated_kalmanet_summary, (q, k, v, beta, g), (k, v, g), (start_kk, start))


@pytest.mark.parametrize("tile", [2048, 5])
def test_cross_entropy_and_its_gradient_are_optax_s_whatever_the_tile(monkeypatch, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    hidden, kernel, d = random(2, 7, 8), random(8, 31, seed=1), random(2, 7, seed=2)
    targets = jax.random.randint(jax.random.key(3), (2, 7), 0, 31)
    got, pull = jax.vjp(lambda h, k: cross_entropy.cross_entropy(h, k, targets), hidden, kernel)
    want, pull_want = jax.vjp(lambda h, k: optax.softmax_cross_entropy_with_integer_labels(h @ k, targets), hidden, kernel)
    for a, b in zip((got, *pull(d)), (want, *pull_want(d)), strict=True):
        assert relative_error(a, b) < 1e-6


def test_the_zigzag_layout_gives_every_device_an_early_and_a_late_chunk():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    x = np.arange(48).reshape(2, 24)
    assert np.array_equal(from_zigzag(to_zigzag(x, 4), 4), x)
    with pytest.raises(ValueError, match="10 tokens cannot be split into 8 chunks for mesh axis 'seq' of size 4"):
        zigzag_order(10, 4)


def test_a_batch_s_targets_follow_their_tokens_through_the_layout():
    rows = {
        "input_ids": np.arange(16).reshape(1, 16),
        "segment_ids": np.repeat([[1, 2]], 8, axis=1),
        "loss_weights": np.ones((1, 16)),
    }
    batch = training_batch(rows, 4)
    assert np.array_equal(batch["targets"][batch["weights"] > 0], batch["input_ids"][batch["weights"] > 0] + 1)
    assert batch["weights"].sum() == 15 and not np.array_equal(batch["input_ids"], rows["input_ids"])
    assert np.array_equal(batch["positions"], batch["input_ids"] % 8)
    assert np.array_equal(positions_of(jnp.asarray(rows["segment_ids"])), positions_of(rows["segment_ids"]))


def test_repeated_layers_are_found():
    assert find_repeats("ababab") == [(0, 2, 3)]
    assert find_repeats("aaabbb") == [(0, 1, 3), (3, 1, 3)]
    assert find_repeats("aaba") == [(0, 1, 2), (2, 2, 1)]  # three layers in two repeats, not in three
    assert sum(r.length for r in find_repeats("a" * 64)) == 1
    published = "*gggggg**ggg" + "*" * 14 + "ggg*gggggg"  # Qwen3-8B's layers in arXiv 2605.08301
    repeats = find_repeats(published)
    assert sum(r.length for r in repeats) == 8
    assert "".join(published[r.start : r.start + r.length] * r.count for r in repeats) == published


def test_a_deep_model_is_traced_as_fast_as_a_shallow_one():
    """The program of 32 alternating layers is that of 4 with the parameters of more stacked."""

    def equations(layers):
        model = tiny_model("-".join(["*", "GDN"] * (layers // 2)))
        jaxpr = jax.make_jaxpr(lambda ids: model(ids))(jnp.zeros((1, 8), jnp.int32)).jaxpr
        return sum(e.primitive.name == "scan" for e in jaxpr.eqns), sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)

    assert equations(32) == equations(4)


@pytest.mark.parametrize("pattern", ["*-GKA-*-GKA", "*-*-GDN-GDN"])
@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_scanned_and_rematerialized_layers_give_the_same_gradients(pattern, remat):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))

    def grads(scan, remat):
        model = tiny_model(pattern)
        model.scan, model.remat = scan, remat
        structure, parameters = split_model(model)
        return jax.grad(lambda p: jnp.sum(join_model(structure, p)(ids) ** 2))(parameters)

    want, got = grads(False, "none"), grads(True, remat)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-4, name


def test_meshes_are_checked_against_devices_and_model():
    with pytest.raises(ValueError, match="the mesh has the unknown key 'rows'"):
        make_mesh({"rows": 2})
    with pytest.raises(ValueError, match="needs 2 devices, there are 1"):
        make_mesh({"fsdp": 2}, jax.devices()[:1])
    with pytest.raises(ValueError, match="expected a mesh like"):
        parse_mesh("fsdp:8")
    assert parse_mesh("fsdp=8, seq=4") == {"fsdp": 8, "seq": 4}
    assert dict(make_mesh({"data": -1}, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "expert": 1, "seq": 1, "tensor": 1}
    config = tiny_config("*-GKA")
    for sizes, words in (
        ({"tensor": 4}, "'tensor' divides num_key_value_heads in 4 shards, which do not divide 2"),
        ({"fsdp": 5}, "'fsdp*seq*expert' divides hidden_size in 5 shards, which do not divide 24"),
        ({"seq": 4}, "'seq' divides seq_len in 8 shards (two chunks per device), which do not divide 20"),
        ({"data": 3}, "batch_size in 3 shards, which do not divide 4"),
        ({"expert": 2}, "needs a mixture-of-experts model"),
    ):
        with pytest.raises(ValueError) as e:
            check_mesh_fits(config, abstract_mesh(sizes), 4, 20)
        assert words in str(e.value)
    mixture = tiny_config("*-GKA", family="qwen3_moe", moe=MoEConfig(8, 2, 12))
    with pytest.raises(ValueError, match="num_experts in 3 shards, which do not divide 8"):
        check_mesh_fits(mixture, abstract_mesh({"expert": 3}), 3, 20)
    packed = dataclasses.replace(tiny_config("*-M3"), vocab_size=64, mixers=(Mamba3Config(state_size=4),))  # one angle
    with pytest.raises(ValueError, match="'tensor' divides width of mamba3.in_proj in 2 shards, which do not divide "):
        check_mesh_fits(packed, abstract_mesh({"tensor": 2}), 4, 20)
    check_mesh_fits(packed.with_pattern("*-*"), abstract_mesh({"tensor": 2}), 4, 20)


def test_stacked_training_gives_the_gradients_of_layers_by_themselves():
    """Of six alternating layers and a seventh, with only the mixers and the last attention training."""
    model = tiny_model("*-GKA-*-GKA-*-GKA-*")
    structure, parameters = split_model(model)
    trainable = {n for n in parameters if ".gka." in n or n.startswith("layers.6.self_attn.")}
    repeats = training_repeats(model.config, trainable)
    names = stacked_names(model.config, repeats)
    stacked_graph, stated = stacked_structure(model, repeats)
    axes = {name: mark.axes for name, mark in stated.items()}
    together = stack(parameters, names)
    assert {n for ns in names.values() for n in ns} == set(parameters)
    assert sum(r.length for r in repeats) == 3 and all(len(axes[n]) == x.ndim for n, x in together.items())
    alone = logical_axes(model)
    assert all(axes[new] == (*[None] * (len(olds) > 1), *alone[olds[0]]) for new, olds in names.items())
    mixed = [olds for olds in names.values() if 0 < len(trainable & set(olds)) < len(olds)]
    assert not mixed
    assert unstack(together, names).keys() == parameters.keys()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    want = jax.grad(lambda p: jnp.sum(join_model(structure, p)(ids) ** 2))(parameters)
    got = unstack(jax.grad(lambda p: jnp.sum(join_model(stacked_graph, p)(ids) ** 2))(together), names)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-4, name


def test_layers_of_different_windows_are_not_stacked_together():
    config = tiny_config("*-*-*-*", attention_windows=(None, None, 6, 6))
    assert [(r.start, r.length, r.count) for r in training_repeats(config, abstract_parameters(config))] == [(0, 1, 2), (2, 1, 2)]


def test_layers_with_and_without_rope_are_not_stacked_together():
    config = tiny_config("*-*-*-*", rotary_layers=(True, True, True, False))
    assert [(r.start, r.length, r.count) for r in training_repeats(config, abstract_parameters(config))] == [(0, 1, 3), (3, 1, 1)]
