"""The chunked forms with many chunks side by side, as accelerators run them; a CPU sees one chunk at a time otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import chunks
from tests.conftest import relative_error
from tests.kernels.conftest import make

OPS = ["linear_attention", "gated_delta_rule", "gated_kalmanet"]


def everything(op, implementation, inputs, state, segment_ids):
    """Outputs, final states and the gradients of every input under cotangents of both."""
    options = dict(num_iter=12) if op == "gated_kalmanet" else {}
    run = functools.partial(getattr(kp, op), segment_ids=segment_ids, implementation=implementation, chunk_size=8, **options)
    out, pull = jax.vjp(lambda inputs, state: run(**inputs, initial_state=state), inputs, state)
    rng = np.random.default_rng(5)
    do, *dstates = (jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in jax.tree.leaves(out))
    if op == "gated_kalmanet":  # H is symmetric, and so is its cotangent
        dstates[0] = dstates[0] + dstates[0].swapaxes(-1, -2)
    return out, pull((do, tuple(dstates) if len(dstates) > 1 else dstates[0]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_many_chunks_side_by_side_have_the_recurrences_outputs_states_and_gradients(op, packed, monkeypatch):
    """In float64 against the derivative of the recurrence, token by token: nothing but an error of the form is left."""
    inputs, state, segment_ids = make(op, 37, 0.3)
    segment_ids = segment_ids if packed else None
    monkeypatch.setattr(chunks, "backend", lambda: "gpu")
    with jax.enable_x64(True):
        inputs, state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, state))
        got = jax.jit(everything, static_argnums=(0, 1))(op, "xla", inputs, state, segment_ids)
        want = jax.jit(everything, static_argnums=(0, 1))(op, "reference", inputs, state, segment_ids)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-9, path


@pytest.mark.parametrize("op", OPS)
def test_many_chunks_in_float32_stay_within_its_rounding(op, monkeypatch):
    inputs, state, segment_ids = make(op, 37, 0.3)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32), jnp.float64), (inputs, state))
        want = jax.tree.map(np.asarray, everything(op, "reference", *double, segment_ids))
    monkeypatch.setattr(chunks, "backend", lambda: "gpu")
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (inputs, state))
    got = jax.jit(everything, static_argnums=(0, 1))(op, "xla", *single, segment_ids)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32 and relative_error(a, b) < 1e-4, path
