"""Properties of every operation and implementation: lengths, decays, packing, splitting, steps, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from tests.conftest import relative_error
from tests.kernels.conftest import B, H, K, V, cut, make_inputs, make_state, run

STATEFUL = ["linear_attention", "gated_delta_rule", "gated_kalmanet", "ssd", "short_conv"]


def in_float64(f):
    """Runs a test's oracle in float64."""

    @functools.wraps(f)
    def wrapped(*args, **kw):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, f(*args, **kw))

    return wrapped


@in_float64
def oracle(op, inputs, **kw):
    double = {n: jnp.asarray(np.asarray(x), jnp.float64) for n, x in inputs.items()}
    if kw.get("initial_state") is not None:
        kw["initial_state"] = jax.tree.map(lambda s: jnp.asarray(np.asarray(s), jnp.float64), kw["initial_state"])
    return run(op, double, "reference", **kw)


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all()
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("op", STATEFUL)
@pytest.mark.parametrize("T", [1, 7, 8, 19])
def test_chunked_equals_the_float64_recurrence_at_any_length(op, T):
    inputs, state = make_inputs(op, T), make_state(op)
    tolerance = 5e-5 if op == "gated_kalmanet" else 1e-5
    assert_close(run(op, inputs, initial_state=state), oracle(op, inputs, initial_state=state), tolerance)


@pytest.mark.parametrize("op", STATEFUL[:4])
@pytest.mark.parametrize("strength", [0.0, 5.0, 50.0])
def test_any_decay_from_none_to_fifty_gives_finite_and_right_results(op, strength):
    inputs = make_inputs(op, 40, strength=strength)
    assert_close(run(op, inputs, chunk=16), oracle(op, inputs), 5e-5 if op == "gated_kalmanet" else 1e-5)


def test_a_weak_decay_after_a_strong_one_keeps_its_precision():
    """The cumulative sum reaches -1600 in the chunk; differences after it must still be exact."""
    inputs = make_inputs("linear_attention", 64)
    g = np.full((B, 64, H), -0.01, np.float32)
    g[:, :32] = -50
    inputs["log_decay"] = jnp.asarray(g)
    assert_close(run("linear_attention", inputs, chunk=64), oracle("linear_attention", inputs), 2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("op", STATEFUL)
def test_packed_segments_equal_separate_sequences(op, implementation):
    """Also segments of one token, and ids that need not rise; the initial state is the first segment's. In float64, because the
    rounding of float32 in Gated KalmaNet's solve depends on the processor."""
    bounds, ids = [0, 5, 6, 17, 23], [7, 3, 9, 3]
    segments = jnp.asarray(np.tile(np.repeat(ids, np.diff(bounds)), (B, 1)))
    with jax.enable_x64(True):
        inputs, state = (
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), x) for x in (make_inputs(op, 23), make_state(op))
        )
        packed, packed_state = run(op, inputs, implementation, initial_state=state, segment_ids=segments)
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            alone, last = run(op, cut(inputs, slice(a, b)), implementation, initial_state=state if i == 0 else None)
            assert_close(packed[:, a:b], alone, 1e-9)
        assert_close(packed_state, last, 1e-9)


@pytest.mark.parametrize("op", STATEFUL)
def test_gradients_of_packed_segments_equal_those_of_separate_sequences(op):
    inputs = make_inputs(op, 13)
    segments = jnp.asarray(np.tile(np.repeat([1, 2], [6, 7]), (B, 1)))

    def packed(inputs):
        return jnp.sum(jnp.sin(run(op, inputs, segment_ids=segments)[0]))

    def separate(inputs):
        return sum(jnp.sum(jnp.sin(run(op, cut(inputs, s))[0])) for s in (slice(0, 6), slice(6, 13)))

    got, want = jax.grad(packed)(inputs), jax.grad(separate)(inputs)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 1e-4, name


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("op", STATEFUL)
@pytest.mark.parametrize("at", [1, 2, 9, 16])
def test_splitting_a_sequence_and_carrying_the_state_changes_nothing(op, implementation, at):
    inputs = make_inputs(op, 17)
    whole, state = run(op, inputs, implementation)
    first, carried = run(op, cut(inputs, slice(0, at)), implementation)
    second, end = run(op, cut(inputs, slice(at, 17)), implementation, initial_state=carried)
    assert_close(jnp.concatenate([first, second], axis=1), whole, 2e-5)
    assert_close(end, state, 2e-5)


@pytest.mark.parametrize("op", STATEFUL)
def test_the_step_continues_the_sequence(op):
    inputs = make_inputs(op, 9)
    whole, end = run(op, inputs)
    _, state = run(op, cut(inputs, slice(0, 7)))
    for t in (7, 8):
        o, state = getattr(kp, f"{op}_step")(**cut(inputs, t), state=state)
        assert_close(o, whole[:, t], 2e-5)
    assert_close(state, end, 2e-5)


@pytest.mark.parametrize("op", STATEFUL)
def test_gradients_equal_float64_differences_of_the_recurrence(op):
    """Through initial and final states too."""
    inputs, state = make_inputs(op, 11, strength=1.0, beta_max=1.0), make_state(op)
    arguments = {**inputs, "initial_state": state}

    def objective(implementation, arguments):
        o, end = run(
            op,
            {n: x for n, x in arguments.items() if n != "initial_state"},
            implementation,
            initial_state=arguments["initial_state"],
        )
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(s)) for s in jax.tree.leaves(end))

    got = jax.grad(functools.partial(objective, "xla"))(arguments)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), arguments)
        want = jax.tree.map(np.asarray, jax.grad(functools.partial(objective, "reference"))(double))
    for name in arguments:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            assert relative_error(a, b) < 1e-4, name


@pytest.mark.parametrize("op", STATEFUL)
def test_the_recurrence_is_the_formula(op):
    """The reference against a plain loop in numpy, float64."""
    T = 6
    x = {n: np.asarray(v, np.float64) for n, v in make_inputs(op, T).items()}
    want = np.zeros((B, T, 6) if op == "short_conv" else (B, T, H, V))
    for b in range(B):
        if op == "short_conv":
            padded = np.concatenate([np.zeros((3, 6)), x["x"][b]])
            for t in range(T):
                y = (padded[t : t + 4] * x["weight"].T).sum(0) + x["bias"]
                want[b, t] = y / (1 + np.exp(-y))
            continue
        for h in range(H):
            S, M = np.zeros((K, V)), np.zeros((K, K))
            for t in range(T):
                if op == "ssd":
                    S = np.exp(x["a"][h] * x["dt"][b, t, h]) * S + x["dt"][b, t, h] * np.outer(x["b"][b, t, 0], x["x"][b, t, h])
                    want[b, t, h] = x["c"][b, t, 0] @ S + x["d"][h] * x["x"][b, t, h]
                    continue
                q, k, v, decay = (x[n][b, t, h] for n in ("q", "k", "v", "log_decay"))
                S = np.exp(decay) * S
                if op == "gated_delta_rule":
                    S = S + x["beta"][b, t, h] * np.outer(k, v - S.T @ k)
                else:
                    S = S + np.outer(k, v)
                if op == "gated_kalmanet":
                    M = np.exp(decay) * M + np.outer(k, k)
                    solved = np.linalg.solve(M + 0.02 * np.linalg.norm(M) * np.eye(K), q)
                    q = q + x["alpha"][b, t, h] * (solved - q)
                want[b, t, h] = K**-0.5 * S.T @ q
    got, _ = oracle(op, make_inputs(op, T))
    # 30 Chebyshev iterations stop a few 1e-4 from the exact solution
    assert relative_error(got, want) < (2e-3 if op == "gated_kalmanet" else 1e-7)


@pytest.mark.parametrize("op", STATEFUL)
def test_bfloat16_inputs_stay_within_a_percent_and_keep_float32_states(op):
    inputs = {
        n: x.astype(jnp.bfloat16) if x.ndim == 4 or op == "short_conv" else x for n, x in make_inputs(op, 40, beta_max=1).items()
    }
    o, state = run(op, inputs, chunk=16)
    assert o.dtype == jnp.bfloat16
    if op != "short_conv":
        assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(state))
    assert relative_error(o.astype(jnp.float32), oracle(op, inputs)[0]) < 1e-2


def test_empty_states_and_zero_keys_have_finite_gradients():
    """Zero keys make H = 0: no norm to divide by, nor to differentiate."""

    def outputs(implementation, inputs):
        return run("gated_kalmanet", inputs, implementation)[0]

    inputs = make_inputs("gated_kalmanet", 6)
    inputs["k"] = inputs["k"] * 0
    for implementation in ("reference", "xla"):
        o, pull = jax.vjp(functools.partial(outputs, implementation), inputs)
        assert np.isfinite(o).all()
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(pull(jnp.ones_like(o))))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_a_convolution_carries_on_inputs_of_the_last_segment_only(implementation):
    inputs = make_inputs("short_conv", 5)
    _, state = kp.short_conv(**inputs, segment_ids=jnp.asarray([[7, 7, 7, 7, 8]] * 2), implementation=implementation)
    want = np.zeros((2, 3, 6))
    want[:, -1] = inputs["x"][:, -1]
    assert np.array_equal(state, want)


def test_no_iterations_skip_the_solve():
    inputs = make_inputs("gated_kalmanet", 9)
    plain = {n: inputs[n] for n in ("q", "k", "v", "log_decay")}
    got, _ = run("gated_kalmanet", inputs, num_iter=0)
    want, _ = run("linear_attention", plain)
    assert_close(got, want, 1e-6)


def test_wrong_shapes_and_names_are_refused_with_what_was_wanted():
    inputs = make_inputs("gated_delta_rule", 5)
    with pytest.raises(ValueError, match=r"beta must be \[B, T, H\] = \(2, 5, 2\), got \(2, 4, 2\)"):
        kp.gated_delta_rule(**{**inputs, "beta": inputs["beta"][:, :4]})
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        kp.gated_delta_rule(**inputs, implementation="cuda")
    with pytest.raises(ValueError, match="power of two"):
        kp.gated_delta_rule(**inputs, chunk_size=24)


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule", "gated_kalmanet"])
def test_shapes_that_would_broadcast_are_refused_by_steps_and_summaries(op):
    inputs, state = make_inputs(op, 5), make_state(op)
    token, step = cut(inputs, 1), getattr(kp, f"{op}_step")
    step(**token, state=state)
    for name in token:  # one head of k or v would be a group, and is right
        wrong = token[name][:1] if name in ("k", "v") else token[name][:, :1]
        with pytest.raises(ValueError, match="must be"):
            step(**{**token, name: wrong}, state=state)
    with pytest.raises(ValueError, match=r"must be \[B, H, K, [KV]\]"):
        step(**token, state=jax.tree.map(lambda s: s[:1], state))
    summary = {n: x for n, x in inputs.items() if n not in ("q", "alpha")}
    with pytest.raises(ValueError, match=r"log_decay must be \[B, T, H\] = \(2, 5, 2\), got \(2, 1, 2\)"):
        getattr(kp, f"{op}_summary")(**{**summary, "log_decay": inputs["log_decay"][:, :1]})


def test_shapes_that_would_broadcast_are_refused_by_ssd_and_the_convolution():
    inputs = make_inputs("ssd", 5)
    for name, wrong in (("dt", inputs["dt"][..., :1]), ("a", inputs["a"][:1]), ("d", inputs["d"][:1])):
        with pytest.raises(ValueError, match=f"{name} must be"):
            kp.ssd(**{**inputs, name: wrong})
    token = cut(make_inputs("short_conv", 5), 1)
    with pytest.raises(ValueError, match=r"bias must be \[D\] = \(6,\), got \(1,\)"):
        kp.short_conv_step(**{**token, "bias": token["bias"][:1]}, state=make_state("short_conv"))


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule", "gated_kalmanet"])
def test_options_that_mean_nothing_are_refused_by_name(op):
    """A gradient divides by the scale, a chunk of 0 would be the default, and -1 iterations another number than 0."""
    inputs, state = make_inputs(op, 5), make_state(op)
    wrong = [("scale", 0.0), ("chunk_size", 0), ("chunk_size", -4)]
    wrong += [("num_iter", -1), ("ridge_strength", 0.0), ("ridge_strength", -0.3)] * (op == "gated_kalmanet")
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            getattr(kp, op)(**inputs, **{name: value})
        if name != "chunk_size":
            with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
                getattr(kp, f"{op}_step")(**cut(inputs, 1), state=state, **{name: value})


@pytest.mark.parametrize("num_iter", [0, 30])
def test_gated_kalmanet_is_linear_attention_with_its_solved_queries(num_iter):
    """Values of any width, with states before the tokens and several segments, in gradients too."""
    inputs, (h_kk, h_kv) = make_inputs("gated_kalmanet", 19), make_state("gated_kalmanet")
    segments = jnp.asarray(np.repeat([1, 2], [5, 14])[None].repeat(B, 0))
    solve = dict(num_iter=num_iter, segment_ids=segments, chunk_size=8)

    def directly(q, k, v, alpha, log_decay):
        return kp.gated_kalmanet(q, k, v, alpha, log_decay, scale=0.5, initial_state=(h_kk, h_kv), implementation="xla", **solve)

    def by_queries(q, k, v, alpha, log_decay):
        queries, kk = kp.gated_kalmanet_queries(q, k, alpha, log_decay, initial_state=h_kk, **solve)
        options = dict(scale=0.5, initial_state=h_kv, segment_ids=segments, chunk_size=8, implementation="xla")
        o, kv = kp.linear_attention(queries, k, v, log_decay, **options)
        return o, (kk, kv)

    assert_close(by_queries(**inputs), directly(**inputs), 1e-5)
    gradients = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(**x)[0])))(inputs) for f in (by_queries, directly)]
    assert_close(*gradients, 1e-4)
