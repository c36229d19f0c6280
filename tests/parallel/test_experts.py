"""Rows in groups: places by counting, gathers whose gradients are gathers, and products group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import MoEConfig
from hybrid_jax.layers.mlp import _choices
from hybrid_jax.parallel.experts import BLOCK, from_groups, gradient_of_kernels, group, grouped_matmul, to_groups
from tests.conftest import relative_error

RNG = np.random.default_rng(0)
CHOSEN = {
    "fewer than a block": RNG.integers(0, 5, (7, 3)),
    "several blocks, the last not full": RNG.integers(0, 5, (BLOCK, 3))[:-5],
    "an expert that nobody chose": np.array([[1, 2], [4, 2], [1, 4]]),
    "nobody's own": np.array([[0], [0]]),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_choices_are_placed_by_expert_in_their_order_and_others_last(case):
    chosen, first, experts = CHOSEN[case], 1, 3
    got = group(jnp.asarray(chosen), experts, first)
    flat = chosen.reshape(-1)
    want = np.argsort(np.where((flat >= first) & (flat < first + experts), flat, 99), kind="stable")
    assert np.array_equal(got.order, want) and np.array_equal(np.asarray(got.places).reshape(-1)[want], np.arange(flat.size))
    assert got.sizes.tolist() == [int((flat == expert).sum()) for expert in range(first, first + experts)]
    assert np.array_equal(got.own, (chosen >= first) & (chosen < first + experts))


def test_rows_go_to_the_groups_and_back_and_so_do_their_gradients():
    chosen, rows = CHOSEN["fewer than a block"], jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32)
    groups, weights = group(jnp.asarray(chosen), 3, 1), jnp.asarray(RNG.normal(size=(7, 3, 4)), jnp.float32)
    garbage = (jnp.arange(21) >= groups.sizes.sum())[:, None]  # a grouped product leaves rows of other experts undefined

    def there_and_back(rows):
        x = to_groups(rows, groups)
        return from_groups(jnp.where(garbage, jnp.nan, jnp.sin(x)), groups)

    want = jnp.where(np.asarray(groups.own)[..., None], jnp.sin(rows)[:, None], 0)
    got, pull = jax.vjp(there_and_back, rows)
    assert np.array_equal(got, want)
    want_gradient = jnp.sum(jnp.where(groups.own[..., None], weights, 0), axis=1) * jnp.cos(rows)
    assert relative_error(pull(weights)[0], want_gradient) < 1e-6


def test_what_other_experts_rows_bring_back_is_not_read():
    groups = group(jnp.asarray(CHOSEN["fewer than a block"]), 3, 1)
    brought = jnp.where((jnp.arange(21) >= groups.sizes.sum())[:, None], jnp.nan, 1.0)
    (d,) = jax.vjp(lambda rows: to_groups(rows, groups), jnp.zeros((7, 1)))[1](brought)
    assert np.array_equal(d[:, 0], np.asarray(groups.own).sum(1))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_the_tpu_s_gradient_of_kernels_is_that_of_every_group(dtype, tolerance):
    sizes = jnp.array([70, 0, 130, 1], jnp.int32)  # of 240 rows; the last ones are in no group
    x, d = (jnp.asarray(RNG.normal(size=(240, n)), dtype) for n in (128, 256))
    kernels = jnp.asarray(RNG.normal(size=(4, 128, 256)), dtype)
    (want,) = jax.vjp(lambda w: jax.lax.ragged_dot(x.astype(jnp.float32), w, sizes), kernels.astype(jnp.float32))[1](
        d.astype(jnp.float32)
    )
    got = gradient_of_kernels(x, jnp.where((jnp.arange(240) < 201)[:, None], d, jnp.nan), sizes)
    assert relative_error(got, want) < tolerance and got.shape == (4, 128, 256)


def test_a_grouped_product_has_the_gradients_of_its_groups_products():
    sizes, n = jnp.array([2, 0, 3], jnp.int32), 5
    x, kernels, d = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((n, 4), (3, 4, 6), (n, 6)))
    owner = np.repeat(np.arange(3), sizes)
    want, pull = jax.vjp(lambda x, w: jnp.einsum("ni,nio->no", x, w[owner]), x, kernels)
    got, pull_got = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, kernels)
    for a, b in zip((got, *pull_got(d)), (want, *pull(d)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_router_of_sigmoids_chooses_the_largest_scores_also_where_sigmoids_are_1():
    moe = MoEConfig(4, 1, 8, sigmoid_router=True, norm_topk_prob=False)
    weights, chosen = _choices(jnp.ones((1, 1)), jnp.array([[17.0, 18.0, 30.0, 25.0]]), moe)
    assert chosen.tolist() == [[2]] and weights.tolist() == [[1.0]]
