"""A layer of Gated KalmaNet solves by the solver its config names."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.config import GKAConfig
from hybrid_jax.layers.gka import GatedKalmaNet
from tests.conftest import relative_error, tiny_config


def test_conjugate_gradients_change_the_layer_by_no_more_than_the_solve_s_error():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, tiny_config("*-GKA").hidden_size)), jnp.float32)
    place = dict(positions=jnp.arange(20)[None], segment_ids=jnp.zeros((1, 20), int))

    def output(**options):
        config = tiny_config("*-GKA").with_options(GKAConfig(**options))
        return GatedKalmaNet(config, 1, rngs=nnx.Rngs(0))(x, **place)[0]

    with jax.default_matmul_precision("highest"):
        chebyshev, cg, exact = output(), output(solver="cg"), output(num_iter=200)
    assert 0 < relative_error(cg, chebyshev) < 2e-3
    assert relative_error(cg, exact) < relative_error(chebyshev, exact)
