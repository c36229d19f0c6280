"""Conjugate gradients solve Gated KalmaNet as well as Chebyshev's iteration does: judged by the output, on keys of many kinds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from hybrid_jax.config import GKAConfig
from tests.conftest import relative_error
from tests.kernels.test_extremes import weak

T, D, RIDGE = 192, 128, 0.02
CG: Any = dict(solver="cg", num_iter=18)


def low(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def walk(rng, correlation):
    """Vectors [T, D], each correlated with the one before."""
    x = rng.standard_normal((T, D))
    for t in range(1, T):
        x[t] = correlation * x[t - 1] + np.sqrt(1 - correlation**2) * x[t]
    return x


def silu(x):
    return x / (1 + np.exp(-x))


def symmetric(rng, eigenvalues):
    axes, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return (axes * eigenvalues) @ axes.T


@functools.cache
def streams() -> Any:
    """Twelve kinds of tokens, one per head, as bf16 numbers in float32: (q, k, v [T, 12, D], log decays [T, 12], (H, S))."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, T, 12, D))
    g, H, S = np.full((T, 12), -0.01), np.zeros((12, D, D)), np.zeros((12, D, D))
    g[:, 1] = -0.3 * rng.uniform(size=T)  # a fast decay
    for head, correlation, decay in ((2, 0.95, 0.02), (3, 0.99, 0.02), (10, 0.99, 0.004)):
        k[:, head], g[:, head] = walk(rng, correlation), -decay * rng.uniform(size=T)
    q[:, 10] = k[:, 10] + 0.1 * q[:, 10]  # queries that are nearly the keys
    k[:, 4] += 3 * rng.standard_normal(D)  # a common mean
    q[:, 5], k[:, 5] = silu(2 * q[:, 5]), silu(2 * k[:, 5])
    g[:, 6] = -np.exp(rng.uniform(np.log(0.5), np.log(20), T))  # decays that leave little or nothing
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    k[:40, 7] = 0  # an empty state, and keys after it
    H[8], H[9] = symmetric(rng, 30 * np.logspace(0, -4, D)), symmetric(rng, np.where(np.arange(D) < 4, 300.0, 0.01))
    S[8:10], g[:, 8:10] = 0.3 * rng.standard_normal((2, D, D)), -0.001
    k[:, 8:10] *= 0.3
    k[:, 11], g[:, 11] = k[:, 11] * rng.uniform(size=(T, 1)), 0
    return *map(low, (q, k, v)), np.float32(g), (np.float32(H), np.float32(S))


@functools.cache
def exact():
    """The outputs [T, 12, D] with exact solutions, in float64."""
    q, k, v, g, (H, S) = jax.tree.map(np.float64, streams())
    o = np.zeros_like(v)
    for t in range(T):
        H, S = (np.exp(g[t])[:, None, None] * s + k[t][..., None] * x[t][:, None] for s, x in ((H, k), (S, v)))
        norm = np.linalg.norm(H, axis=(1, 2))
        ridge = np.where(norm > 0, RIDGE * norm, 1)
        x = np.linalg.solve(H + ridge[:, None, None] * np.eye(D), q[t][..., None])[..., 0] * (norm > 0)[:, None]
        o[t] = D**-0.5 * np.einsum("hkv,hk->hv", S, x)
    return o


def output(implementation, dtype, **options: Any):
    q, k, v, g, state = streams()
    arrays: Any = [jnp.asarray(x[None], dtype) for x in (q, k, v)]
    state: Any = tuple(jnp.asarray(s[None]) for s in state)
    options |= dict(initial_state=state, implementation=implementation)
    arrays += [jnp.ones((1, T, 12)), jnp.asarray(g[None])]
    return kp.gated_kalmanet(*arrays, **options)[0].astype(jnp.float32)[0]


def errors(got, want):
    """The error of every stream."""
    return np.array([relative_error(got[:, n], want[:, n]) for n in range(12)])


def test_eighteen_iterations_are_as_exact_as_thirty_of_chebyshev():
    cg, chebyshev = (errors(output("xla", "float32", **options), exact()) for options in (CG, dict(num_iter=30)))
    assert cg.max() < 4e-4 and chebyshev.max() < 3e-4 and np.median(cg) < 1e-4 < np.median(chebyshev)


def test_the_kernels_of_bf16_solve_to_1_5e_3_of_exact_solutions_for_every_kind_of_keys():
    """The output is rounded to bf16 too: an error of 1.7e-3 by itself, which is a different one."""
    found = output("pallas_tpu", "bfloat16", **CG)
    for n in range(12):
        rounding = relative_error(low(exact()[:, n]), exact()[:, n])
        assert relative_error(found[:, n], exact()[:, n]) < np.hypot(rounding, 1.5e-3), n


def test_the_accurate_kernel_reaches_exact_solutions_in_thirty_iterations():
    found = errors(output("pallas_tpu", "bfloat16", precision="accurate", solver="cg", num_iter=30), exact())
    strong = 6  # decays up to e^-20 a token cost a digit
    assert np.delete(found, strong).max() < 2e-5 and found[strong] < 1e-4


def gradients(implementation, dtype, size):
    """The output and the gradients, divided by `size`, under cotangents of that size; a few keys, so that every solve converges."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 1, 20, 1, 8))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    inputs = (q, k, v, rng.uniform(size=(1, 20, 1)), -0.1 * rng.uniform(size=(1, 20, 1)))
    run = functools.partial(kp.gated_kalmanet, implementation=implementation, **CG)
    o, pull = jax.vjp(lambda *x: run(*x)[0], *(jnp.asarray(x, dtype) for x in inputs))
    return o, [x / size for x in pull(jnp.asarray(size * v, dtype))]


@functools.cache
def in_float64() -> Any:
    """By the recurrence: `gradients`, and outputs of `weak` after decays of e^-30."""
    with jax.enable_x64(True):
        mild: Any = [jnp.asarray(np.asarray(x, np.float32), jnp.float64) for x in weak(30)]
        o, _ = kp.gated_kalmanet(*mild, implementation="reference", **CG)
        return jax.tree.map(np.asarray, (gradients("reference", "float64", 1.0), o))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
def test_gradients_are_the_implicit_ones_of_the_reference_however_small(implementation):
    got = gradients(implementation, "float32", 1e-12)
    for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(in_float64()[0]), strict=True):
        assert relative_error(x, want) < 1e-4


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu", "pallas_gpu"])
def test_a_weak_state_a_zero_key_and_an_empty_state_are_solved(implementation):
    inputs: Any = [jnp.asarray(x, jnp.float32) for x in weak(60)]
    o, pull = jax.vjp(lambda *x: kp.gated_kalmanet(*x, implementation=implementation, **CG)[0], *inputs)
    assert np.isfinite(o).all() and all(np.isfinite(x).all() for x in pull(o))
    for t in (3, 127, 128):
        assert relative_error(o[:, t], in_float64()[1][:, t]) < 1e-4
    nothing = kp.gated_kalmanet(inputs[0], 0 * inputs[1], *inputs[2:], implementation=implementation, **CG)[0]
    assert np.isfinite(nothing).all()


def test_a_step_on_tpu_iterates_as_the_recurrence_does():
    q, k, v, g, (H, S) = streams()
    arrays: Any = [jnp.asarray(x[None, -1]) for x in (q, k, v, np.ones_like(g), g)]
    state = jnp.asarray(H[None] + np.eye(D, dtype=np.float32)), jnp.asarray(S[None])
    options: Any = dict(state=state, solver="cg", num_iter=3)
    got, want = (kp.gated_kalmanet_step(*arrays, implementation=i, **options)[0] for i in ("pallas_tpu", "reference"))
    assert relative_error(got, want) < 1e-4


def test_an_unknown_solver_is_refused_where_it_enters():
    q, k, v, g, state = streams()
    inputs: Any = [jnp.asarray(x[None, :1]) for x in (q, k, v, np.ones((T, 12)), g)]
    message = "solver must be one of chebyshev, cg, got 'newton'"
    with pytest.raises(ValueError, match=f"gated_kalmanet: {message}"):
        kp.gated_kalmanet(*inputs, solver="newton")
    with pytest.raises(ValueError, match=f"gated_kalmanet_queries: {message}"):
        kp.gated_kalmanet_queries(*inputs[:2], *inputs[3:], solver="newton")
    state: Any = tuple(jnp.asarray(s[None]) for s in state)
    with pytest.raises(ValueError, match=f"gated_kalmanet_step: {message}"):
        kp.gated_kalmanet_step(*(x[:, 0] for x in inputs), state=state, solver="newton")
    with pytest.raises(ValueError, match="solver 'cg' needs a ridge_strength of at least 0.0001, got 1e-05"):
        kp.gated_kalmanet(*inputs, 1e-5, solver="cg")
    with pytest.raises(ValueError, match="gka_config.solver = 'cg' needs a ridge_strength of at least 1e-4"):
        GKAConfig(solver="cg", ridge_strength=1e-5)
