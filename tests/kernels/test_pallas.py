"""The Pallas kernels, interpreted: equal to the float64 recurrence in outputs, states and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import arguments, triton
from kernels_pallas.lab.cases import CASES, Shape, program
from tests.conftest import relative_error
from tests.kernels.conftest import make

OPS = ["linear_attention", "gated_delta_rule", "gated_kalmanet", "short_conv"]
FORMS = [(op, "pallas_tpu") for op in OPS] + [(op, "pallas_gpu") for op in OPS[:3]]


def few(op):
    """Fewer iterations than the default, for time."""
    return dict(num_iter=12) if op.startswith("gated_kalmanet") else {}


def everything(op, implementation, inputs, state, segment_ids):
    """Outputs, final states and the gradients of everything under cotangents of both."""

    def run(inputs, state):
        return getattr(kp, op)(**inputs, initial_state=state, segment_ids=segment_ids, implementation=implementation, **few(op))

    out, pull = jax.vjp(run, inputs, state)
    rng = np.random.default_rng(5)

    def cotangent(x):
        d = rng.standard_normal(x.shape)
        if x.ndim == 4 and x.shape[-1] == x.shape[-2] and op == "gated_kalmanet":
            d = d + d.swapaxes(-1, -2)  # H is symmetric, and so are its cotangents
        return jnp.asarray(d, x.dtype)

    return out, pull(jax.tree.map(cotangent, out))


def in_float64(op, inputs, state, segment_ids):
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, state))
        return jax.tree.map(np.asarray, everything(op, "reference", *double, segment_ids))


@pytest.mark.parametrize("strength", [0.3, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op, implementation", FORMS)
def test_outputs_states_and_gradients_equal_the_float64_recurrence(op, implementation, dtype, strength):
    """Two chunks and a rest, packed segments of one and more tokens, an initial state, odd sizes."""
    inputs, state, segment_ids = make(op, 131, strength)
    low = {n: jnp.asarray(x, dtype if x.ndim != 3 or n == "x" else "float32") for n, x in inputs.items()}
    state = jax.tree.map(lambda s: jnp.asarray(s, dtype if op == "short_conv" else "float32"), state)
    got = everything(op, implementation, low, state, segment_ids)
    want = in_float64(op, low, state, segment_ids)
    out, grads = (2e-5, 1e-4) if dtype == "float32" else (1e-2, 2e-2)
    for tolerance, a, b in zip((out, grads), got, want, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert np.isfinite(np.asarray(x, np.float32)).all()
            assert relative_error(x, y) < tolerance


@pytest.mark.parametrize("op, implementation", FORMS[:4])
def test_one_token_is_a_sequence(op, implementation):
    inputs, state, _ = make(op, 1, 0.3)
    inputs, state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (inputs, state))
    got = everything(op, implementation, inputs, state, None)
    want = in_float64(op, inputs, state, None)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-4


@pytest.mark.parametrize("at", [1, 64])
@pytest.mark.parametrize("op, implementation", FORMS)
def test_splitting_a_sequence_and_carrying_the_state_changes_nothing(op, implementation, at):
    inputs, _, _ = make(op, 70, 0.3)
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()}

    def run(where, state):
        part = {n: x[:, where] if n not in ("weight", "bias") else x for n, x in inputs.items()}
        return getattr(kp, op)(**part, initial_state=state, implementation=implementation, **few(op))

    whole, end = run(slice(None), None)
    first, carried = run(slice(0, at), None)
    second, last = run(slice(at, None), carried)
    assert relative_error(jnp.concatenate([first, second], axis=1), whole) < 2e-5
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(end), strict=True):
        assert relative_error(a, b) < 2e-5


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_identical_keys_and_full_gates_do_not_break_the_inverse(implementation):
    """beta = 2 and one key for all tokens: every row of L is -2 below the diagonal, the worst the inverse can meet.

    No decay forgets a rounding here: bf16 operands cost 2.7 % whatever the inverse, so a float32 one over chunks of
    the same size is the measure.
    """
    inputs, state, _ = make("gated_delta_rule", 131, 0.0)
    B, _, H, K = inputs["k"].shape
    inputs |= dict(beta=np.full((B, 131, H), 2.0), k=np.broadcast_to((np.arange(K) < 16) / 4.0, (B, 131, H, K)))
    for dtype, limit in (("float32", 1e-4), ("bfloat16", None)):
        low = {n: jnp.asarray(x, dtype if x.ndim == 4 else "float32") for n, x in inputs.items()}
        start = jnp.asarray(state, jnp.float32)
        run = functools.partial(kp.gated_delta_rule, **low, initial_state=start, chunk_size=64)
        want = run(implementation="reference" if limit else "xla")
        with jax.enable_x64(True):
            exact = kp.gated_delta_rule(
                **{n: jnp.asarray(np.asarray(x, np.float64)) for n, x in low.items()},
                initial_state=jnp.asarray(state, jnp.float64),
                implementation="reference",
            )
        for got, form, true in zip(run(implementation=implementation), want, exact, strict=True):
            assert relative_error(got, true) < (limit or 1.05 * relative_error(form, true))


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_the_precise_solve_is_within_2e_5_and_the_fast_one_within_2e_3_of_float64(implementation):
    """From the same bf16 inputs, at 128 dims and 30 iterations; the fast output is compared before it is rounded."""
    rng = np.random.default_rng(0)
    shape = (1, 256, 1, 128)
    q, k = rng.standard_normal((2, *shape))
    k = k + rng.standard_normal(128)  # correlated keys: H has one large eigenvalue
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, rng.standard_normal(shape)))
    alpha, g = (jnp.asarray(x, jnp.float32) for x in (rng.uniform(0, 1, shape[:3]), -0.1 * rng.uniform(0, 1, shape[:3])))
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, alpha, g)]
        want = np.asarray(kp.gated_kalmanet(*double, implementation="reference")[0])
    accurate = kp.gated_kalmanet(q, k, v, alpha, g, precision="accurate", implementation=implementation)[0]
    fast = kp.gated_kalmanet(q, k, v, alpha, g, precision="fast", implementation=implementation)[0]
    assert accurate.dtype == jnp.float32 and relative_error(accurate, want) < 2e-5
    rounding = relative_error(jnp.asarray(want, jnp.bfloat16).astype(jnp.float32), want)
    assert fast.dtype == jnp.bfloat16 and relative_error(fast.astype(jnp.float32), want) < np.hypot(rounding, 1e-3) < 2e-3


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_zero_keys_have_finite_gradients(implementation):
    inputs, _, _ = make("gated_kalmanet", 6, 0.3)
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()}
    inputs["k"] = inputs["k"] * 0
    o, pull = jax.vjp(lambda x: kp.gated_kalmanet(**x, num_iter=3, implementation=implementation)[0], inputs)
    assert np.isfinite(o).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(pull(jnp.ones_like(o))))


def step_inputs(op):
    inputs, state, _ = make(op, 1, 0.3)
    rng = np.random.default_rng(2)  # several rows: 5 x 3 heads do not fill two grid steps
    inputs = {
        n: jnp.asarray(np.repeat(x[:, 0], 5, 0) + 0.1 * rng.uniform(size=(5, *x.shape[2:])), jnp.float32) for n, x in inputs.items()
    }
    inputs["log_decay"] = -jnp.abs(inputs["log_decay"])
    return inputs, jax.tree.map(lambda s: jnp.asarray(np.repeat(s, 5, 0), jnp.float32), state)


@pytest.mark.parametrize("op", OPS[:3])
def test_a_step_on_tpu_equals_the_recurrence_and_has_its_gradient(op):
    inputs, state = step_inputs(op)

    def step(implementation, inputs, state):
        options = dict(num_iter=2) if op == "gated_kalmanet" else {}
        return getattr(kp, f"{op}_step")(**inputs, state=state, implementation=implementation, **options)

    (got, pull), (want, pull_want) = (jax.vjp(functools.partial(step, i), inputs, state) for i in ("pallas_tpu", "reference"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 2e-5
    for a, b in zip(jax.tree.leaves(pull(want)), jax.tree.leaves(pull_want(want)), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [n for n in CASES if n.split(".")[0].removesuffix("_accurate").removesuffix("_cg") in OPS[:3]])
def test_the_gpu_kernels_lower_for_cuda(name, dtype, monkeypatch):
    """As far as a machine without a GPU can tell: every Pallas call becomes a Triton kernel."""
    monkeypatch.setattr(triton, "backend", lambda: "gpu")
    function, arrays = program(CASES[name], Shape(1, 256, 2, 128, 64, dtype), "pallas_gpu")
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[check])
    gpu = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        assert "__gpu$xla.gpu.triton" in export(*(jax.ShapeDtypeStruct(*a) for a in arrays)).mlir_module()


def test_none_means_the_best_the_backend_has(monkeypatch):
    table = {"xla": "x", "pallas_tpu": "t", "reference": "r"}
    x = jnp.ones(2)
    assert arguments.pick_implementation("op", None, table, x) == "x"
    monkeypatch.setattr(arguments, "backend", lambda: "tpu")
    assert arguments.pick_implementation("op", None, table, x) == "t"
    devices = jax.sharding.AbstractMesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(devices):  # the compiler would have to partition the kernel
        assert arguments.pick_implementation("op", None, table, x) == "x"
    with jax.enable_x64(True):
        assert arguments.pick_implementation("op", None, table, jnp.ones(2, jnp.float64)) == "x"
        with pytest.raises(ValueError, match="pallas_tpu has no float64"):
            arguments.pick_implementation("op", "pallas_tpu", table, jnp.ones(2, jnp.float64))


def test_what_a_kernel_can_not_do_is_refused():
    inputs, _, _ = make("gated_delta_rule", 5, 0.3)
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()}
    with pytest.raises(ValueError, match="chunk_size 16, 32, 64 or 128, got 24"):
        kp.gated_delta_rule(**inputs, implementation="pallas_gpu", chunk_size=24)
    with pytest.raises(ValueError, match="precision must be one of fast, accurate, got 'best'"):
        kp.gated_kalmanet(*(inputs[n] for n in ("q", "k", "v", "beta", "log_decay")), precision="best")
    with pytest.raises(ValueError, match="at most 8 taps, got 9"):
        kp.short_conv(jnp.ones((1, 4, 8)), jnp.ones((8, 9)), implementation="pallas_tpu")
