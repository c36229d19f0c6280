"""Attention in chunks: a query sees its own chunk of its document, whatever the window, the heads and the way to the result."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import SWAConfig
from hybrid_jax.layers import make_mixer
from hybrid_jax.parallel.sequence import positions_of
from tests.conftest import relative_error, tiny_config

B, T, CHUNK = 2, 30, 7
SEGMENTS = np.stack([np.repeat([1, 2], [12, 18]), np.repeat([5, 3], [16, 14])])
POSITIONS = positions_of(SEGMENTS)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 24)), jnp.float32)
AT = dict(positions=jnp.asarray(POSITIONS), segment_ids=jnp.asarray(SEGMENTS))


def attention(kind, window=6, pattern="*"):
    config = tiny_config(pattern, attention_windows=(CHUNK,), chunked_windows=True, swa=SWAConfig(window))
    mixer: Any = make_mixer(kind, config, 0, rngs=nnx.Rngs(0))
    return mixer if pattern == "*" else mixer.attention


CASES = {
    "attention": (lambda: attention("attention"), CHUNK),
    "a shorter window": (lambda: attention("swa", 3), 3),
    "a longer window": (lambda: attention("swa", 9), CHUNK),
    "kept heads": (lambda: attention("gdn", pattern="GDN[1]"), CHUNK),
}


@pytest.mark.parametrize("case", CASES)
def test_a_query_sees_the_keys_of_its_chunk_and_window_and_no_others(case):
    make, window = CASES[case]
    distance = POSITIONS[:, :, None] - POSITIONS[:, None, :]
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & (POSITIONS[:, :, None] // CHUNK == POSITIONS[:, None, :] // CHUNK)
    wanted = same & (distance >= 0) & (distance < window)
    seen = np.asarray(matrix(make()) > 0)
    assert np.array_equal(seen, np.broadcast_to(wanted[:, None], seen.shape))


@nnx.jit
def matrix(layer):
    return layer.mixing(X, **AT).matrix()


@nnx.jit
def through(layer, x, positions, segment_ids, state):
    return layer(x, positions=positions, segment_ids=segment_ids, state=state)


@nnx.jit
def by_matrix(layer):
    mixing = layer.mixing(X, **AT)
    return layer.o_proj(jnp.einsum("bhts,bshd->bthd", mixing.matrix(), mixing.values).reshape(B, T, -1))


@pytest.mark.parametrize("case", [case for case in CASES if case != "a longer window"])
def test_a_cache_that_goes_on_in_the_middle_of_a_chunk_gives_what_the_matrix_gives_and_so_does_the_row_at_once(case):
    layer = CASES[case][0]()
    want, parts, state = by_matrix(layer), [], layer.init_state(B, T)
    assert relative_error(through(layer, X, *AT.values(), None)[0], want) < 1e-5
    for begin in (0, 10, 20):
        y, state = through(layer, *(x[:, begin : begin + 10] for x in (X, *AT.values())), state)
        parts.append(y)
    assert relative_error(jnp.concatenate(parts, axis=1), want) < 1e-5
