"""What must stay in float32 although activations are bfloat16: norms, positions, decays, and every recurrent state."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kernels_pallas as kp
from hybrid_jax.layers.linear import RMSNorm
from hybrid_jax.layers.recurrent import log_decay
from hybrid_jax.layers.rope import cos_sin, rotate
from kernels_pallas.numerics import l2_normalize, rms_normalize
from tests.conftest import relative_error, tiny_model

BF16 = ml_dtypes.bfloat16


def rounded_once(got, exact):
    """Whether bfloat16 numbers are an exact result rounded once: but for a few ties, the very same numbers."""
    assert got.dtype == jnp.bfloat16
    return np.mean(np.asarray(got, np.float64) != np.asarray(exact).astype(BF16).astype(np.float64)) < 0.01


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(BF16)


def test_a_norm_of_bfloat16_activations_is_rounded_once():
    x, weight = draw(8, 256), draw(256, seed=1)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    assert rounded_once(rms_normalize(jnp.asarray(x), jnp.asarray(weight), 1e-6), want * weight.astype(np.float64))
    assert rounded_once(RMSNorm(256, eps=1e-6, dtype=jnp.bfloat16)(jnp.asarray(x)), want)


@pytest.mark.parametrize("outside", [True, False])
def test_a_unit_vector_of_bfloat16_activations_is_rounded_once(outside):
    wide = draw(8, 64).astype(np.float64)
    square = (wide**2).sum(-1, keepdims=True)
    want = wide / (np.sqrt(square) + 1e-6 if outside else np.sqrt(square + 1e-6))
    assert rounded_once(l2_normalize(jnp.asarray(draw(8, 64)), eps_outside=outside), want)


def test_a_position_is_not_rounded_to_bfloat16():
    """4097 is 4096 in bfloat16: a radian less for the fastest pair."""
    x, inv_freq = draw(1, 2, 1, 16), 1e4 ** -(np.arange(0, 16, 2) / 16)
    positions = np.array([[4097, 70001]])
    angle = positions[..., None] * inv_freq
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    want = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    got = rotate(jnp.asarray(x), *cos_sin(jnp.asarray(positions), inv_freq))
    assert got.dtype == jnp.bfloat16 and relative_error(got, want) < 1e-2
    assert relative_error(rotate(jnp.asarray(x, jnp.float32), *cos_sin(jnp.asarray(positions), inv_freq)), want) < 3e-3


def test_a_decay_of_bfloat16_activations_and_parameters_is_float32():
    dt, a_log, bias = draw(2, 3, 4), draw(4, seed=1), draw(4, seed=2)
    wide = [x.astype(np.float64) for x in (dt, a_log, bias)]
    want = -np.exp(wide[1]) * np.log1p(np.exp(wide[0] + wide[2]))
    got = log_decay(*map(jnp.asarray, (dt, a_log, bias)))
    assert got.dtype == jnp.float32 and relative_error(got, want) < 1e-6


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule", "gated_kalmanet"])
def test_a_state_forgets_a_thousandth_a_token_although_bfloat16_cannot_say_so(op, steps):
    """0.999 is 1 in bfloat16 to three digits: after 100 tokens of nothing, e^-0.1 of a state of ones is left."""
    T, K = 100, 4
    nothing, scalars = jnp.zeros((1, T, 1, K), jnp.bfloat16), jnp.zeros((1, T, 1), jnp.bfloat16)
    inputs = dict(q=nothing, k=nothing, v=nothing, log_decay=jnp.full((1, T, 1), -1e-3, jnp.float32))
    inputs |= {"gated_delta_rule": dict(beta=scalars), "gated_kalmanet": dict(alpha=scalars)}.get(op, {})
    options = dict(num_iter=2) if op == "gated_kalmanet" else {}
    ones = jnp.ones((1, 1, K, K), jnp.float32)
    state = (ones, ones) if op == "gated_kalmanet" else ones
    if steps:
        for t in range(0, T, 10):  # ten tokens' decay at a time
            token = {n: x[:, t] for n, x in inputs.items()} | {"log_decay": jnp.full((1, 1), -1e-2, jnp.float32)}
            _, state = getattr(kp, f"{op}_step")(**token, state=state, **options)
    else:
        _, state = getattr(kp, op)(**inputs, initial_state=state, chunk_size=32, **options)
    for s in state if op == "gated_kalmanet" else (state,):
        assert s.dtype == jnp.float32 and np.abs(np.asarray(s, np.float64) / np.exp(-0.1) - 1).max() < 1e-5


def test_states_of_bfloat16_decoding_are_float32():
    model = tiny_model("GKA-GDN-M2-BMF")
    model.compute_dtype = jnp.dtype(jnp.bfloat16)
    ids = jnp.zeros((1, 2), jnp.int32)
    _, (gka, gdn, m2, bmf) = model.hidden_states(ids, None, jnp.arange(2)[None], model.init_state(1, 4))
    for S in (gka.h_kk, gka.h_kv, gdn.S, m2.S, bmf.mixer.h_kk, bmf.mixer.h_kv):
        assert S.dtype == jnp.float32 and np.asarray(S).any()
        assert not np.array_equal(np.asarray(S), np.asarray(S).astype(BF16).astype(np.float32))
