"""Tokens spread over a mesh axis, on one device: a vmapped axis named `seq` stands for the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from hybrid_jax.flops import traced_flops
from hybrid_jax.parallel import tiles
from hybrid_jax.parallel.attention import attend, attend_windows, ring_attention
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.divergence import divergence
from hybrid_jax.parallel.mesh import abstract_mesh
from hybrid_jax.parallel.recurrence import _conv_over_chunks, incoming_states
from hybrid_jax.parallel.sequence import (
    SEQ_AXIS,
    continued,
    exclusive_scan,
    from_pair,
    from_zigzag,
    halo,
    halo_segments,
    shift,
    to_pair,
    to_zigzag,
    zigzag_order,
)
from kernels_pallas import HeadNorm
from tests.conftest import relative_error
from tests.parallel.conftest import plain_attention, random


def by_gathering(x, axis, pairs):
    """`jax.lax.ppermute` by its definition, zeros where nothing is sent; vmap's own takes permutations of all devices only."""
    source = np.full(jax.lax.axis_size(axis), -1)
    source[[b for _, b in pairs]] = [a for a, _ in pairs]
    mine = jnp.asarray(source)[jax.lax.axis_index(axis)]
    return jax.tree.map(lambda x: jnp.where(mine >= 0, jax.lax.all_gather(x, axis)[mine], jnp.zeros_like(x)), x)


@pytest.fixture
def any_pairs(monkeypatch):
    monkeypatch.setattr(jax.lax, "ppermute", by_gathering)


def on_devices(function, n, *arrays):
    """`function` of every device's part of arrays [B, T, ...] in order of time; its result likewise."""
    parts = [jnp.stack(jnp.split(to_zigzag(x, n), n, axis=1)) for x in arrays]
    out = jax.jit(jax.vmap(function, axis_name=SEQ_AXIS))(*parts)
    return jax.tree.map(lambda x: from_zigzag(jnp.concatenate(list(x), axis=1), n), out)


def chunks_in_order(x, n):
    """[n, 2, ...] of devices' chunks -> [2n, ...] in order of time."""
    return jnp.stack([x[i, 0] for i in range(n)] + [x[i, 1] for i in reversed(range(n))])


def of_chunks(function, n, x):
    """`function` of chunks [2n, ...], given and returned in order of time."""
    devices = jnp.stack([jnp.stack([x[i], x[2 * n - 1 - i]]) for i in range(n)])
    return jax.tree.map(lambda y: chunks_in_order(y, n), jax.jit(jax.vmap(function, axis_name=SEQ_AXIS))(devices))


def test_the_zigzag_order_of_three_devices():
    assert zigzag_order(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert zigzag_order(5, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("distance", [1, 2, 3, 5, -1, -2, -3, -5])
def test_a_shift_brings_each_chunk_what_one_so_far_before_it_has(any_pairs, distance):
    x, nothing = jnp.arange(1.0, 7), np.zeros(abs(distance))
    want = np.concatenate([nothing, x[:-distance]] if distance > 0 else [x[-distance:], nothing])
    np.testing.assert_array_equal(of_chunks(lambda x: shift(x, distance), 3, x), want)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 10])
def test_a_halo_is_the_tokens_before_each_chunk_however_many_chunks_they_span(any_pairs, length):
    row = np.arange(1, 13)
    before = np.concatenate([np.zeros(length, int), row])
    want = np.stack([before[i : i + length] for i in range(0, 12, 2)])[:, None]
    got = of_chunks(lambda x: halo(x, length), 3, jnp.asarray(row).reshape(6, 1, 2))
    np.testing.assert_array_equal(got, want)
    ids = of_chunks(lambda x: halo_segments(x, length), 3, jnp.asarray(row).reshape(6, 1, 2))
    np.testing.assert_array_equal(ids, np.where(want == 0, -1, want))


def test_a_chunk_is_continued_where_the_one_before_it_ends_in_its_segment(any_pairs):
    ids = jnp.asarray([1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0]).reshape(6, 1, 2)
    assert of_chunks(continued, 3, ids)[:, 0].tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_an_exclusive_scan_composes_all_maps_before_a_chunk_in_their_order(any_pairs, n):
    """Affine maps of the plane, which do not commute."""
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(2 * n, 2, 2)), rng.normal(size=(2 * n, 2))
    state, want = np.zeros(2), []
    for i in range(2 * n):
        want.append(state)
        state = A[i] @ state + b[i]

    def then(earlier, later):
        (A1, b1), (A2, b2) = earlier, later
        return A2 @ A1, jnp.einsum("cij,cj->ci", A2, b1) + b2

    both = jnp.asarray(np.concatenate([A, b[:, :, None]], axis=-1), jnp.float32)
    got = of_chunks(lambda x: exclusive_scan((x[..., :2], x[..., 2]), then)[1], n, both)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transition", [(), (2, 2)])
def test_a_chunk_starts_from_what_its_own_segment_left_before_it(any_pairs, transition):
    """Decays that are numbers and transitions that do not commute. Segments begin at a border of chunks and inside one, whose
    A is 0; four devices, eight chunks of two tokens."""
    rng = np.random.default_rng(0)
    ids = np.repeat([1, 2, 3], [2, 9, 5]).reshape(8, 2)
    A, b = rng.normal(size=(8, *transition)), rng.normal(size=(8, 2, 3))
    A[5] = 0
    state, want = np.zeros((2, 3)), []
    for i in range(8):
        begins = i == 0 or ids[i - 1, -1] != ids[i, 0]
        want.append(np.zeros((2, 3)) if begins else state)
        state = (A[i] @ want[-1] if transition else A[i] * want[-1]) + b[i]

    def local(x):  # [2, B, ...]
        ids, b, A = x[..., :2].astype(jnp.int32), x[:, :, 2:8], x[:, :, 8:]
        heads = (2, 1, 1)
        return incoming_states((A.reshape(*heads, *transition), b.reshape(*heads, 2, 3)), ids)[:, 0, 0]

    packed = np.concatenate([x.reshape(8, -1) for x in (ids, b, A)], axis=1)[:, None]
    np.testing.assert_allclose(of_chunks(local, 4, jnp.asarray(packed, jnp.float32)), np.stack(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [None, HeadNorm("rms", 3, 0.1)])
def test_a_conv_wider_than_a_chunk_sees_the_tokens_of_its_segment(norm, any_pairs):
    """Chunks of two tokens and a width of four; segments begin at a border and inside a chunk; inputs normed or not."""
    x, weight, norm_weight = random(2, 12, 3), random(3, 4, seed=1), None if norm is None else random(3, seed=2)
    ids = jnp.asarray([[1] * 4 + [2] * 5 + [3] * 3, [1] * 12], jnp.int32)
    options = dict(activation="silu", norm=norm)
    got = on_devices(lambda x, ids: _conv_over_chunks(ids, x, weight, None, norm_weight, **options), 3, x, ids)
    inputs = np.asarray(x)
    if norm is not None:
        inputs = inputs / np.sqrt((inputs**2).mean(-1, keepdims=True) + norm.eps) * np.asarray(norm_weight)
    seen = np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :]
    before = np.zeros((2, 12, 3))
    for t in range(12):
        for back in range(min(4, t + 1)):
            before[:, t] += seen[:, t, t - back, None] * inputs[:, t - back] * np.asarray(weight)[:, 3 - back]
    np.testing.assert_allclose(got, before / (1 + np.exp(-before)), rtol=1e-5, atol=1e-6)


def test_a_vocabulary_in_parts_gives_the_losses_and_the_top_k_tokens_of_all_of_it(monkeypatch):
    """Three devices with four tokens of the vocabulary each; two logits are equal, in parts of different devices."""

    def on_parts(function, arrays, axes, out_axes):
        parts = [jnp.stack(jnp.split(x, 3, axis=1)) if a == tiles.HEAD else x for x, a in zip(arrays, axes, strict=True)]
        mapped = jax.vmap(function, in_axes=tuple(0 if a == tiles.HEAD else None for a in axes), axis_name="tensor")
        return jax.tree.map(lambda x: x[1], mapped(*parts))

    monkeypatch.setattr(tiles, "mesh_axes_of", lambda logical: ("tensor",) if logical == "vocab" else ())
    monkeypatch.setattr(tiles, "shard_map_by_axes", on_parts)
    hidden, head, targets = random(1, 6, 8), random(8, 12, seed=1), jnp.asarray([[0, 3, 4, 7, 8, 11]])
    head = head.at[:, 10].set(head[:, 1])
    log_p = jax.nn.log_softmax(hidden @ head)
    np.testing.assert_allclose(cross_entropy(hidden, head, targets)[0], -log_p[0, jnp.arange(6), targets[0]], rtol=1e-5)
    teacher = random(1, 6, 8, seed=2)
    log_q = jax.nn.log_softmax(teacher @ head)
    found = divergence(hidden, head, teacher, head)
    np.testing.assert_allclose(found, jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1), rtol=1e-4, atol=1e-5)
    for k in (2, 6):  # fewer and more than a part has
        values, ids = jax.lax.top_k(log_p, k)
        got_ids, got = tiles.top_k_tokens(hidden, head, k)
        np.testing.assert_array_equal(got_ids, ids)
        np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-6)


def packed(T):
    """Two rows: documents that cross the chunks' borders, and one with padding at its end."""
    rows = np.ones((2, T), np.int32)
    rows[0, T // 3 :], rows[0, T - 5 :], rows[1, T - T // 4 :] = 2, 3, 0
    return jnp.asarray(rows)


@pytest.mark.parametrize(
    "n, window, soft_cap", [(2, None, None), (4, None, None), (3, 2, None), (4, 17, None), (2, None, 0.7), (3, 9, 0.7)]
)
def test_the_ring_gives_attention_and_its_gradient_whatever_the_window(n, window, soft_cap):
    q, k, v, do = random(2, 24, 2, 4), random(2, 24, 1, 4, seed=1), random(2, 24, 1, 4, seed=2), random(2, 24, 2, 4, seed=3)
    segments = packed(24)

    def local(q, k, v, do, segments):
        o, pull = jax.vjp(lambda *x: ring_attention(*x, segments, window, soft_cap), q, k, v)
        return o, *pull(do)

    got = on_devices(local, n, q, k, v, do, segments)
    want, pull = jax.vjp(lambda *x: plain_attention(*x, segments, 0, window, soft_cap), q, k, v)
    for a, b in zip(got, (want, *pull(do)), strict=True):
        assert relative_error(a, b) < 1e-6


def equations(jaxpr, times=1):
    """Every equation of a jaxpr and of what it calls, with how often it runs."""
    for e in jaxpr.eqns:
        yield e, times
        for inner in jaxprs_in_params(e.params):
            yield from equations(inner, times * e.params.get("length", 1))


def abstract(T, H=2, D=4, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, T, H, D), dtype), jax.ShapeDtypeStruct((1, T), jnp.int32)


def sent(function, *arguments):
    """Arrays that one device sends, by dtype and size: how often."""
    counts = {}
    for e, times in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        for x in e.invars if e.primitive.name == "ppermute" else ():
            counts[x.aval.dtype.name, x.aval.size] = counts.get((x.aval.dtype.name, x.aval.size), 0) + times
    return counts


@pytest.mark.parametrize("n", [2, 3, 5])
def test_keys_travel_to_all_other_devices_and_no_further(n):
    """n - 1 times forward; n - 1 times in the backward pass, and as often their gradients, home included."""
    T, H, D = 4 * n * 5, 2, 4
    x, ids = abstract(T, H, D, jnp.bfloat16)
    part, tokens = T // n * H * D, T // n
    with jax.sharding.use_abstract_mesh(abstract_mesh({"seq": n})):
        forward = sent(attend, x, x, x, ids)
        both = sent(jax.grad(lambda *a: jnp.sum(attend(*a).astype(jnp.float32)), argnums=(0, 1, 2)), x, x, x, ids)
    assert forward == {("bfloat16", part): 2 * (n - 1), ("int32", tokens): n - 1}
    assert both == {("bfloat16", part): 4 * (n - 1), ("int32", tokens): 2 * (n - 1), ("float32", part): 2 * (n - 1)}


@pytest.mark.parametrize("window", [300, 512, 513, 4096])
def test_a_window_costs_no_more_than_all_of_the_row(window):
    """Windows that reach over the chunk, over the row's half and over the row."""
    x, ids = abstract(1024)
    gradient = jax.grad(lambda window, *a: jnp.sum(attend(*a, window)), argnums=(1, 2, 3))
    with jax.sharding.use_abstract_mesh(abstract_mesh({"seq": 4})):
        full, windowed = (traced_flops(functools.partial(gradient, w), x, x, x, ids) for w in (None, window))
        kept, travelling = (sent(functools.partial(attend, window=w), x, x, x, ids) for w in (None, window))
    assert windowed <= 1.01 * full
    assert (sum(n * size for (_, size), n in travelling.items())) <= 2 * sum(n * size for (_, size), n in kept.items())


def test_a_halo_is_never_longer_than_the_row():
    """B'MOJO's windows of 32 and 64 tokens in a row of 16."""
    n, T = 2, 16
    x, k, v, ids = random(1, T, 2, 8), random(1, T, 2, 8, seed=1), random(1, T, 2, 8, seed=2), packed(T)[:1]
    windows = ((0, 32), (32, 64))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, k, v, ids)]

    def both(x, k, v, ids):
        return attend_windows((x, x), (k, k), (v, v), windows, ids)

    with jax.sharding.use_abstract_mesh(abstract_mesh({"seq": n})):
        tokens = [
            a.shape[1]
            for e, _ in equations(jax.make_jaxpr(both)(*shapes).jaxpr)
            for a in (v.aval for v in e.outvars)
            if a.shape[2:] == (2, 8)
        ]
        assert max(tokens) <= T
    np.testing.assert_allclose(both(x, k, v, ids), plain_attention(x, k, v, ids, 0, None), rtol=1e-5, atol=1e-6)


def test_chunks_join_to_what_was_split():
    x = jnp.arange(12).reshape(2, 6)
    assert to_pair(x).tolist() == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    np.testing.assert_array_equal(from_pair(to_pair(x)), x)
