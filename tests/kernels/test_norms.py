"""Norms of heads around the convolution, the gated norm and the hidden norm: equal to float64 and to what the layers round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import kernels_pallas as kp
from hybrid_jax.layers.rope import cos_sin, rotate
from kernels_pallas import mosaic
from kernels_pallas.gated_rms_norm import tpu as gated_tpu
from kernels_pallas.mamba3 import rotate as rotate_pairs
from kernels_pallas.numerics import l2_normalize, rms_normalize
from kernels_pallas.qk_norm_rope import tpu as rope_tpu
from kernels_pallas.qk_norm_turn import tpu as turn_tpu
from kernels_pallas.rms_norm import tpu as hidden_tpu
from kernels_pallas.short_conv import tpu as conv_tpu
from tests.conftest import relative_error

B, T, W = 2, 37, 4
NORMS = {  # with an eps that counts
    "l2": kp.HeadNorm("l2", 0, 0.1),
    "l2_eps_outside": kp.HeadNorm("l2", 0, 0.2, eps_outside=True),
    "rms": kp.HeadNorm("rms", 0, 0.3),
}
IDS = np.repeat([[4, 2, 2, 9], [1, 7, 2, 3]], [3, 1, 18, 15], axis=1)  # borders inside a block and at its first tokens
TOLERANCES = {"float32": (1e-6, 4e-6), "bfloat16": (4e-3, 1e-2)}  # of outputs, whose rounding is 2e-3, and of gradients


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and a rest in few tokens."""
    monkeypatch.setattr(conv_tpu, "CHUNK", 32)
    monkeypatch.setattr(rope_tpu, "CHUNK", 32)
    monkeypatch.setattr(turn_tpu, "CHUNK", 32)
    monkeypatch.setattr(gated_tpu, "ROWS", 16)
    monkeypatch.setattr(hidden_tpu, "ROWS", 16)


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def everything(function, arrays):
    """The outputs, and the gradients of all arrays under random cotangents."""
    rng = np.random.default_rng(99)
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), jax.eval_shape(function, *arrays))

    @jax.jit
    def run(arrays, cotangents):
        outputs, pull = jax.vjp(function, *arrays)
        return outputs, pull(cotangents)

    return run(arrays, cotangents)


def assert_exact(function, arrays):
    """`function(*arrays, implementation=...)` on TPU equals the formulas of the same arrays in float64, gradients too."""
    got = everything(functools.partial(function, implementation="pallas_tpu"), arrays)
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        want = jax.tree.map(np.asarray, everything(functools.partial(function, implementation="xla"), double))
    for tolerance, a, b in zip(TOLERANCES[arrays[0].dtype.name], got, want, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert np.isfinite(np.asarray(x, np.float32)).all()
            assert relative_error(x, y) < tolerance


def conv_arrays(kind, dim, heads, dtype="float32"):
    """x, weight, bias, the state and, of an RMS norm, its weight."""
    D = heads * dim
    shapes = [(B, T, D), (D, W), (D,), (B, W - 1, D)] + [(dim,)] * (kind == "rms")
    return [normal(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]


def conv(kind, dim, segment_ids=None, activation="silu"):
    """The convolution with a norm as a function of `conv_arrays`."""

    def run(x, weight, bias, state, norm_weight=None, implementation=None):
        options = dict(norm=NORMS[kind]._replace(dim=dim), norm_weight=norm_weight, segment_ids=segment_ids)
        return kp.short_conv(x, weight, bias, activation, initial_state=state, implementation=implementation, **options)

    return run


@pytest.mark.parametrize(
    "dim, heads, dtype", [(64, 3, "float32"), (64, 2, "bfloat16"), (128, 2, "float32"), (128, 1, "bfloat16"), (256, 3, "float32")]
)
@pytest.mark.parametrize("kind", NORMS)
def test_the_convolution_and_its_norm_in_one_kernel_equal_float64_in_packed_rows(kind, dim, heads, dtype):
    assert_exact(conv(kind, dim, IDS), conv_arrays(kind, dim, heads, dtype))


@pytest.mark.parametrize("kind", NORMS)
def test_the_kernel_norms_without_segments_and_without_an_activation_too(kind):
    assert_exact(conv(kind, 128, activation=None), conv_arrays(kind, 128, 1))


@pytest.mark.parametrize("kind", NORMS)
def test_heads_of_other_sizes_are_normed_around_the_kernel(kind):
    assert_exact(conv(kind, 40, IDS), conv_arrays(kind, 40, 2))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dim", [64, 128])
def test_heads_of_zeros_have_finite_and_right_gradients(kind, dim):
    """Head 0 is zero everywhere, head 1 at some tokens."""
    x, weight, bias, state, *rest = conv_arrays(kind, dim, 2)
    x = x.at[:, :, :dim].set(0).at[:, 5:9].set(0)
    arrays = [x, weight, bias.at[:].set(0), state.at[:, :, :dim].set(0), *rest]
    assert_exact(conv(kind, dim), arrays)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_formulas_are_bit_for_bit_those_of_the_layers(implementation):
    x, weight, bias, state, norm_weight = conv_arrays("rms", 8, 3, "bfloat16")

    def heads(f, x):
        return f(x.reshape(B, T, 3, 8)).reshape(x.shape)

    def plain(x):
        return kp.short_conv(x, weight, bias, initial_state=state, implementation=implementation)

    y, end = plain(x)
    for kind in ("l2", "l2_eps_outside"):
        want = heads(functools.partial(l2_normalize, eps=NORMS[kind].eps, eps_outside=NORMS[kind].eps_outside), y)
        got, kept = conv(kind, 8)(x, weight, bias, state, implementation=implementation)
        assert jnp.array_equal(got, want) and jnp.array_equal(kept, end)
    got, kept = conv("rms", 8)(x, weight, bias, state, norm_weight, implementation=implementation)
    want, end = plain(heads(lambda x: rms_normalize(x, norm_weight, 0.3), x))
    assert jnp.array_equal(got, want) and jnp.array_equal(kept, end)

    o, gate, w = (normal(n, B, T, 3, 8, dtype="bfloat16") for n in (5, 6, 7))
    gated = functools.partial(kp.gated_rms_norm, implementation=implementation)
    assert jnp.array_equal(gated(o, gate, w[0, 0, 0]), rms_normalize(o, w[0, 0, 0], 1e-5) * jax.nn.silu(gate))
    assert jnp.array_equal(gated(o, gate, w[0, 0], 1e-5, True), rms_normalize(o * jax.nn.silu(gate), w[0, 0], 1e-5))

    normed, total = kp.rms_norm(x, bias, 1e-6, y, implementation=implementation)
    assert jnp.array_equal(total, x + y) and jnp.array_equal(normed, rms_normalize(x + y, bias, 1e-6))
    assert jnp.array_equal(kp.rms_norm(x, None, implementation=implementation), rms_normalize(x, None, 1e-6))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("kind", ["l2", "rms"])
def test_a_split_sequence_and_a_token_at_a_time_continue_the_state(kind, implementation):
    """Of an RMS norm the state holds normed inputs."""
    x, weight, bias, state, *rest = conv_arrays(kind, 64, 2)
    run = functools.partial(conv(kind, 64), implementation=implementation)
    whole, end = run(x, weight, bias, state, *rest)
    first, kept = run(x[:, :2], weight, bias, state, *rest)
    second, kept = run(x[:, 2:-1], weight, bias, kept, *rest)
    norm = dict(norm=NORMS[kind]._replace(dim=64), norm_weight=rest[0] if rest else None)
    last, kept = kp.short_conv_step(x[:, -1], weight, bias, state=kept, **norm)
    assert relative_error(jnp.concatenate([first, second, last[:, None]], axis=1), whole) < 1e-6
    assert relative_error(kept, end) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_the_state_of_an_rms_norm_leaves_out_earlier_segments(implementation):
    x, weight, bias, _, norm_weight = conv_arrays("rms", 64, 2)
    ids = np.repeat([[7, 8]], [T - 1, 1], axis=1).repeat(B, axis=0)
    _, state = conv("rms", 64, ids)(x, weight, bias, None, norm_weight, implementation=implementation)
    want = np.zeros((B, W - 1, 128))
    want[:, -1] = rms_normalize(x[:, -1].reshape(B, 2, 64), norm_weight, 0.3).reshape(B, 128)
    assert np.allclose(state, want, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("H, D, each", [(3, 64, True), (2, 128, False), (1, 256, True)])
def test_the_gated_norm_equals_float64(H, D, each, gate_first, dtype):
    """With a weight for each head and with one for all."""
    o, gate = (normal(n, B, T, H, D, dtype=dtype) for n in (0, 1))
    o = o.at[:, 3, 0].set(0)
    weight = normal(2, *((H, D) if each else (D,)), dtype=dtype)
    run = functools.partial(kp.gated_rms_norm, eps=0.1, gate_first=gate_first)
    assert_exact(run, [o, gate, weight])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("D", [128, 384])
def test_the_hidden_norm_and_the_sum_before_it_equal_float64(D, dtype):
    """Under cotangents of both outputs; without a residual or a weight too."""
    x, residual, weight = normal(0, B, T, D, dtype=dtype), normal(1, B, T, D, dtype=dtype), normal(2, D, dtype=dtype)
    norm = functools.partial(kp.rms_norm, eps=0.1)
    if dtype == "float32":  # the rounding of the sum is not float64's
        assert_exact(lambda x, r, w, implementation: norm(x, w, residual=r, implementation=implementation), [x, residual, weight])
    assert_exact(lambda x, w, implementation: norm(x, w, implementation=implementation), [x.at[0, 2].set(0), weight])
    assert_exact(lambda x, implementation: norm(x, None, implementation=implementation), [x])


def test_the_norm_of_a_sum_in_bfloat16_is_that_of_the_rounded_sum():
    x, residual, weight = (normal(n, 5, 128, dtype="bfloat16") for n in (0, 1, 2))
    run = functools.partial(kp.rms_norm, eps=1e-6, implementation="pallas_tpu")
    (normed, total), grads = everything(lambda x, r: run(x, weight[0], residual=r), [x, residual])
    assert jnp.array_equal(total, x + residual) and jnp.array_equal(normed, run(total, weight[0]))
    assert grads[0].dtype == jnp.bfloat16 and jnp.array_equal(*grads)
    wide, total = run(x, weight[0], residual=residual.astype(jnp.float32))
    assert wide.dtype == total.dtype == jnp.float32


def test_hidden_sizes_that_no_kernel_has_are_computed_by_the_formulas():
    for D in (40, 1 << 16):
        x, weight = normal(0, 2, D), normal(1, D)
        assert jnp.array_equal(kp.rms_norm(x, weight, implementation="pallas_tpu"), kp.rms_norm(x, weight, implementation="xla"))


def angles(A, T=T):
    """cos and sin of A angles of each token."""
    return [f(3 * normal(8, B, T, A)) for f in (jnp.cos, jnp.sin)]


@pytest.mark.parametrize("D, H, dtype", [(128, 3, "float32"), (128, 6, "bfloat16"), (256, 2, "float32")])
def test_queries_and_keys_normed_and_rotated_in_one_kernel_equal_float64(D, H, dtype):
    q, k = normal(0, B, T, H, D, dtype=dtype), normal(1, B, T, 1, D, dtype=dtype)
    weights, tables = [normal(n, D, dtype=dtype) for n in (2, 3)], angles(D // 2)
    run = functools.partial(kp.qk_norm_rope, eps=0.1, scale=0.3)
    assert_exact(run, [q.at[:, 3].set(0), k, *weights, *tables])
    assert_exact(
        lambda q, k, *tables, implementation: run(q, k, None, None, *tables, implementation=implementation), [q, k, *tables]
    )


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_the_norm_and_the_rotation_are_bit_for_bit_those_of_attention_where_the_formulas_compute_them(implementation):
    """Heads of other sizes, and heads that are rotated in part."""
    positions, frequencies = jnp.arange(T)[None] + jnp.zeros((B, 1), jnp.int32), jnp.asarray([1.0, 0.3, 0.1])
    tables = [f(positions[..., None] * frequencies) for f in (jnp.cos, jnp.sin)]
    for D in (8, 128):
        q, k, w = (normal(n, B, T, 2, D, dtype="bfloat16") for n in (0, 1, 2))
        got = kp.qk_norm_rope(q, k, w[0, 0, 0], None, *tables, 1e-6, implementation=implementation)
        want = [rotate(x, *cos_sin(positions, frequencies)) for x in (rms_normalize(q, w[0, 0, 0], 1e-6), k)]
        assert all(jnp.array_equal(a, b.swapaxes(1, 2)) for a, b in zip(got, want, strict=True))


def turn_arrays(sizes, dtype="float32", T=T):
    """q, k, the weights, the biases and the angles of `qk_norm_turn`; sizes are of K, H, the heads of q and of k, R and A."""
    K, H, Hq, Hk, R, A = sizes
    shapes = [(B, T, R, Hq, K), (B, T, R, Hk, K), (K,), (K,), (H, R, K), (H, R, K)]
    return [*(normal(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)), 3 * normal(9, B, T, H, A)]


@pytest.mark.parametrize(
    "sizes, halves, dtype",
    [
        ((128, 4, 4, 2, 1, 32), False, "float32"),  # four heads share a register of angles
        ((128, 8, 4, 2, 2, 20), True, "bfloat16"),  # two inputs per token, angles that do not fill their lanes
        ((128, 6, 6, 3, 1, 64), False, "bfloat16"),  # every pair is rotated
        ((256, 2, 1, 2, 1, 100), True, "float32"),
        ((128, 10, 10, 1, 1, 5), False, "float32"),  # a group larger than a block
    ],
)
def test_queries_and_keys_normed_biased_and_turned_in_one_kernel_equal_float64(sizes, halves, dtype):
    q, *rest = turn_arrays(sizes, dtype)
    assert_exact(functools.partial(kp.qk_norm_turn, eps=0.1, halves=halves), [q.at[:, 3].set(0), *rest])


@pytest.mark.parametrize("halves", [False, True])
def test_the_norm_the_bias_and_the_rotation_are_mamba3_s_where_the_formulas_compute_them(halves):
    """Heads of sizes that the kernel does not take, and no angles at all."""
    for sizes in ((8, 4, 2, 1, 2, 3), (128, 2, 2, 1, 1, 0)):
        q, k, q_weight, k_weight, q_bias, k_bias, angle = arrays = turn_arrays(sizes, "bfloat16")
        got = kp.qk_norm_turn(*arrays, 1e-6, halves=halves, implementation="pallas_tpu")
        for y, x, weight, bias in zip(got, (q, k), (q_weight, k_weight), (q_bias, k_bias), strict=True):
            h = jnp.repeat(rms_normalize(x, weight, 1e-6), sizes[1] // x.shape[3], axis=3) + bias.swapaxes(0, 1)
            assert jnp.array_equal(y, rotate_pairs(h, angle[:, :, None], halves))


TURNED = ("q", "k", "weight_q", "weight_k", "weight_q_bias", "weight_k_bias", "angle")


def operations(implementation):
    """Every operation as a function of arrays whose gradient is a sum over the batch; those named `weight...` have no batch."""
    conv_norm = NORMS["rms"]._replace(dim=64)
    return {
        "short_conv": (
            dict(x=normal(0, B, 9, 128), weight=normal(1, 128, W), norm_weight=normal(2, 64)),
            lambda x, **kw: kp.short_conv(x, norm=conv_norm, implementation=implementation, **kw)[0],
        ),
        "gated_rms_norm": (
            dict(o=normal(0, B, 9, 2, 64), gate=normal(1, B, 9, 2, 64), weight=normal(2, 2, 64)),
            functools.partial(kp.gated_rms_norm, implementation=implementation),
        ),
        "qk_norm_rope": (
            dict(q=normal(0, B, 9, 1, 128), k=normal(1, B, 9, 1, 128), q_weight=normal(2, 128), k_weight=normal(3, 128))
            | dict(zip(("cos", "sin"), angles(64, T=9), strict=True)),
            lambda **kw: sum(kp.qk_norm_rope(implementation=implementation, **kw)),
        ),
        "qk_norm_turn": (
            dict(zip(TURNED, turn_arrays((128, 1, 1, 1, 1, 7), T=9), strict=True)),
            lambda **kw: sum(kp.qk_norm_turn(*(kw[n] for n in TURNED), implementation=implementation)),
        ),
        "rms_norm": (
            dict(x=normal(0, B, 9, 128), residual=normal(1, B, 9, 128), weight=normal(2, 128)),
            lambda **kw: sum(kp.rms_norm(eps=1e-6, implementation=implementation, **kw)),
        ),
    }


def on(mesh, function, inputs):
    specs = {n: PartitionSpec() if "weight" in n else PartitionSpec("data") for n in inputs}
    return jax.shard_map(lambda x: function(**x), mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec("data"))


@pytest.mark.parametrize("op", ["short_conv", "gated_rms_norm", "qk_norm_rope", "qk_norm_turn", "rms_norm"])
def test_values_and_gradients_in_a_shard_map_are_those_without(op):
    inputs, function = operations("xla")[op]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    got = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(on(mesh, function, x)(x)))))(inputs)
    want = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(function(**x))))(inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("op", ["short_conv", "gated_rms_norm", "qk_norm_rope", "qk_norm_turn", "rms_norm"])
def test_the_kernels_trace_in_a_shard_map_and_explicit_axes_are_refused(op, monkeypatch):
    monkeypatch.setattr(mosaic, "backend", lambda: "tpu")
    inputs, function = operations("pallas_tpu")[op]
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(lambda x: on(mesh, function, x)(x).sum()))(inputs))
    assert text.count("pallas_call") >= 2
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))),
        pytest.raises(ValueError, match=f"{op}: the mesh axes data are of type Explicit"),
    ):
        jax.eval_shape(lambda: function(**inputs))


def test_options_that_do_not_fit_are_refused_with_what_was_wanted():
    x, weight = jnp.ones((1, 4, 8)), jnp.ones((8, W))
    norm = kp.HeadNorm("rms", 4)
    for given, message in (
        (dict(norm=norm._replace(kind="layer")), "unknown norm 'layer'; have 'l2' and 'rms'"),
        (dict(norm=norm._replace(dim=3)), "the norm's dim must be an integer that divides the 8 channels, got 3"),
        (dict(norm=norm._replace(dim=0)), "divides the 8 channels, got 0"),
        (dict(norm=norm._replace(dim=4.0)), "divides the 8 channels, got 4.0"),
        (dict(norm=norm._replace(eps=0.0)), "eps must be a finite number above 0 that float32 has, got 0.0"),
        (dict(norm=norm._replace(eps=1e-40)), "above 0 that float32 has, got 1e-40"),
        (dict(norm=norm._replace(eps_outside=True)), "eps_outside is of an L2 norm"),
        (dict(norm=norm, norm_weight=jnp.ones(8)), r"norm_weight must be \[N\] = \(4,\), got \(8,\)"),
        (dict(norm=norm._replace(kind="l2"), norm_weight=jnp.ones(4)), "an L2 norm has no weight"),
        (dict(norm_weight=jnp.ones(4)), r"give norm=HeadNorm\('rms', dim\) with it"),
    ):
        with pytest.raises(ValueError, match=f"short_conv: .*{message}"):
            kp.short_conv(x, weight, **given)
        with pytest.raises(ValueError, match=f"short_conv_step: .*{message}"):
            kp.short_conv_step(x[:, 0], weight, state=jnp.ones((1, W - 1, 8)), **given)

    o = jnp.ones((1, 4, 2, 8))
    for arrays, eps, message in (
        ((o[0], o[0], o[0, 0]), 1e-5, r"o must be \[B, T, H, D\] and not empty, got \(4, 2, 8\)"),
        ((o[:, :0], o[:, :0], o[0, 0]), 1e-5, "o must be .* not empty"),
        ((o, o[:, :1], o[0, 0]), 1e-5, r"gate must be \[B, T, H, D\] = \(1, 4, 2, 8\), got \(1, 1, 2, 8\)"),
        ((o, o, o[0, 0, :1]), 1e-5, r"weight must be \[D\] or \[H, D\] of o \(1, 4, 2, 8\), got \(1, 8\)"),
        ((o, o, o[0, 0]), -1.0, "eps must be a finite number above 0 that float32 has, got -1.0"),
        ((o, o.astype(int), o[0, 0]), 1e-5, "gate must have a floating-point dtype, got int32"),
    ):
        with pytest.raises(ValueError, match=f"gated_rms_norm: {message}"):
            kp.gated_rms_norm(*arrays, eps)
    q, table = o[..., :6], jnp.ones((1, 4, 3))
    for arrays, message in (
        ((q[0], q, None, None, table, table), r"q and k must be \[B, T, H, D\] and not empty, got \(4, 2, 6\)"),
        ((q, q[:, :1], None, None, table, table), r"k must be \[B, T, G, D\] = \(1, 4, 2, 6\), got \(1, 1, 2, 6\)"),
        ((q, q, jnp.ones(5), None, table, table), r"q_weight must be \[D\] = \(6,\), got \(5,\)"),
        ((q, q, None, None, table, table[:, 1:]), r"sin must be \[B, T, A\] = \(1, 4, 3\), got \(1, 3, 3\)"),
        ((q, q, None, None, *[jnp.ones((1, 4, 4))] * 2), "cos has 4 angles, q 6 channels"),
    ):
        with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
            kp.qk_norm_rope(*arrays)
    for arrays, eps, residual, message in (
        ((x[:0], None), 1e-6, None, r"x must be \[..., D\] and not empty, got \(0, 4, 8\)"),
        ((x, jnp.ones(4)), 1e-6, None, r"weight must be \[D\] = \(8,\), got \(4,\)"),
        ((x, None), 1e-6, x[:, :1], r"residual must have x's shape \(1, 4, 8\), got \(1, 1, 8\)"),
        ((x, None), 0.0, None, "eps must be a finite number above 0 that float32 has, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"rms_norm: {message}"):
            kp.rms_norm(*arrays, eps, residual)
