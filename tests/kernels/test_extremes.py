"""Decays so strong, and states so weak, that a float32 loses them where nobody looks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from tests.conftest import relative_error

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", "pallas_gpu"]
T, K = 48, 16


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def strong(forget, at=40):
    """k, v and log decays of -0.01 but for one token, in float32, and the state after them by a loop in float64."""
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, T, 1, K)).astype(np.float32) for _ in range(2))
    g = np.full((1, T, 1), -0.01, np.float32)
    g[0, at] = -forget
    S = np.zeros((K, K))
    for t in range(T):
        S = np.exp(np.float64(g[0, t, 0])) * S + np.outer(k[0, t, 0].astype(np.float64), v[0, t, 0])
    return *map(jnp.asarray, (k, v, g)), S


@pytest.mark.parametrize("forget", [1e6, np.inf])
def test_a_summary_after_a_strong_decay_is_exact(forget):
    k, v, g, S = strong(forget)
    _, state = kp.linear_attention_summary(k, v, g)
    assert relative_error(state[0, 0], S) < 1e-6
    _, (_, h_kv) = kp.gated_kalmanet_summary(k, v, g)
    assert relative_error(h_kv[0, 0], S) < 1e-6
    whole, _ = kp.linear_attention_summary(k, v, jnp.where(g < -1, -1.5, g))
    assert abs(float(whole[0, 0]) / np.exp(-1.5 - 0.01 * (T - 1)) - 1) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_operation_after_a_decay_that_leaves_nothing_is_exact(implementation):
    k, v, g, S = strong(1e6)
    _, state = kp.linear_attention(k, k, v, g, implementation=implementation)
    assert relative_error(state[0, 0], S) < 1e-6


WEAK = (3, 127, 128)  # inside a chunk, and at a chunk's end and the beginning of the next (TPU chunks have 128 tokens)


def weak(decay):
    """Tokens with all-zero keys at `WEAK`, two of them after a decay of e^-`decay`, among ordinary ones; float64."""
    rng = np.random.default_rng(3)
    q, k, v = unit(rng, 1, 130, 1, K), unit(rng, 1, 130, 1, K), rng.standard_normal((1, 130, 1, K))
    k[:, WEAK] = 0
    g = -0.1 * rng.uniform(0, 1, (1, 130, 1))
    g[:, WEAK[:2]] = -decay
    return [q, k, v, rng.uniform(0.3, 1, (1, 130, 1)), g]


def everything(inputs, **options):
    run = functools.partial(kp.gated_kalmanet, num_iter=12, **options)
    out, pull = jax.vjp(run, *inputs)
    do = jnp.asarray(np.random.default_rng(2).standard_normal(out[0].shape), out[0].dtype)
    return out[0], pull((do, jax.tree.map(jnp.zeros_like, out[1])))


@functools.cache
def exact():
    """In float64, by the recurrence: outputs of `weak` after decays of e^-30, and the gradients after decays of e^-60."""
    with jax.enable_x64(True):
        mild, inputs = ([jnp.asarray(np.asarray(x, np.float32), jnp.float64) for x in weak(decay)] for decay in (30, 60))
        o, _ = kp.gated_kalmanet(*mild, num_iter=12, implementation="reference")
        return jax.tree.map(np.asarray, (o, everything(inputs, implementation="reference")[1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_zero_key_after_a_strong_decay_still_solves_for_what_is_left(implementation):
    """The squares of what is left do not fit a float32 from a decay of e^-44; its solution does not depend on the decay."""
    o, gradients = exact()
    got, pulled = everything([jnp.asarray(x, jnp.float32) for x in weak(60)], implementation=implementation)
    for t in (*WEAK, 2, 4, 126, 129):
        assert relative_error(got[:, t], o[:, t]) < 1e-4, t
        for name, a, b in zip("qkv", pulled, gradients, strict=False):  # sizes differ by e^60: each token by itself
            assert relative_error(a[:, t], b[:, t]) < 1e-3, (name, t)
    for a, b in zip(pulled[3:], gradients[3:], strict=True):  # of a scalar a token nothing but rounding may be left
        assert relative_error(a, b) < 2e-4


@pytest.mark.parametrize("implementation", ["reference", "pallas_tpu"])
def test_a_step_with_a_zero_key_and_a_weak_state_solves_for_what_is_left(implementation):
    q, k, v, alpha, _ = (x[:, 3] for x in weak(60))
    rng = np.random.default_rng(4)
    keys, values = unit(rng, 40, K), rng.standard_normal((40, K))
    H, S = np.exp(-60) * keys.T @ keys, np.exp(-60) * keys.T @ values
    x = np.linalg.solve(H + np.linalg.norm(H) * np.eye(K), q[0, 0])
    want = K**-0.5 * S.T @ (q[0, 0] + alpha[0, 0] * (x - q[0, 0]))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v, alpha, np.zeros((1, 1)))]
    state = tuple(jnp.asarray(s[None, None], jnp.float32) for s in (H, S))
    options = dict(ridge_strength=1.0, num_iter=6, implementation=implementation)  # with so strong a ridge 6 are enough
    o, _ = kp.gated_kalmanet_step(*arrays, state=state, **options)
    assert relative_error(o[0, 0], want) < 1e-4
