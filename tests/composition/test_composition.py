"""Composing caches and states: exact where it must be, published formulas by enumeration, bad values refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import generate
from hybrid_jax.composition import Composition, compose, composed_scores, generate_composed
from hybrid_jax.composition.states import mean_products
from hybrid_jax.config import BMojoConfig, GDNConfig, GKAConfig, Mamba3Config, RopeConfig
from tests.conftest import relative_error, tiny_config, tiny_model

RECURRENT = ["GKA", "GDN", "M2", "DM2", "M3"]
AFTER = 4


def tokens(count, rows=1, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (rows, count))


def states_of(model, context, *names, prefix=(), chunk=5):
    """The composed states, of which the recurrent ones, and the tails, of one-layer models are compared."""
    return [state for state, _ in compose(model, context, [Composition.parse(n, chunk) for n in names], prefix=prefix, after=AFTER)]


def error(got, want):
    return max(relative_error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("pattern", RECURRENT)
def test_exact_composition_of_one_recurrent_layer_is_the_ordinary_pass(pattern, prefix):
    # three chunks of 5 and one of 4; then chunks of 2 and one of 1, fewer tokens than the tail of a convolution has
    model = tiny_model(pattern, mamba3=Mamba3Config(rank=2))
    before, context = tokens(prefix, 2, seed=1) if prefix else (), tokens(19, 2)
    for chunk, length in ((5, 19), (2, 5)):
        exact, ordinary = states_of(model, context[:, :length], "full:exact", "full:ordinary", prefix=before, chunk=chunk)
        assert error(exact, ordinary) < 1e-5
