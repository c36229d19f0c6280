"""A scaled or soft-capped head is the same map in decoding and in every loss, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.data.layout import training_batch
from hybrid_jax.parallel import tiles
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.divergence import divergence
from hybrid_jax.parallel.head import Head
from hybrid_jax.train.objectives import OBJECTIVES
from tests.conftest import relative_error, tiny_config, tiny_model

BIAS = jnp.linspace(-2, 1, 11)
KINDS = {
    "plain": (1.0, None),
    "scaled": (4.0, None),
    "capped": (1.0, 1.5),
    "scaled and capped": (0.5, 2.0),
    "biased, scaled and capped": (0.5, 2.0, BIAS),
}


def logits(hidden, kernel, scaling, cap, bias=0.0):
    x = (hidden @ kernel + bias) / scaling
    return x if cap is None else cap * jnp.tanh(x / cap)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_head_s_logits(monkeypatch, kind):
    monkeypatch.setattr(tiles, "TILE", 4)  # two tiles, the last not full
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel, teacher, weights = (
        jax.random.normal(k, s) for k, s in zip(keys, ((1, 7, 8), (8, 11), (1, 7, 8), (1, 7)), strict=True)
    )
    targets = jnp.arange(7)[None]

    scaling, cap, *bias = KINDS[kind]

    def entropies(hidden, kernel, *bias):
        return jnp.sum(weights * cross_entropy(hidden, Head(kernel, scaling, cap, *bias), targets))

    def plain_entropies(hidden, kernel, *bias):
        found = jax.nn.log_softmax(logits(hidden, kernel, scaling, cap, *bias))
        return -jnp.sum(weights * jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0])

    def divergences(hidden, kernel, *bias):
        head = Head(kernel, scaling, cap, *bias)
        return jnp.sum(weights * divergence(hidden, head, teacher, head, temperature=1.3))

    def plain_divergences(hidden, kernel, *bias):
        q, p = (jax.nn.log_softmax(logits(x, kernel, scaling, cap, *bias) / 1.3) for x in (jax.lax.stop_gradient(teacher), hidden))
        q = jax.lax.stop_gradient(q)
        return jnp.sum(weights * jnp.sum(jnp.exp(q) * (q - p), axis=-1))

    for ours, plain in ((entropies, plain_entropies), (divergences, plain_divergences)):
        got, want = (jax.value_and_grad(f, argnums=tuple(range(2 + len(bias))))(hidden, kernel, *bias) for f in (ours, plain))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative_error(a, b) < 2e-5
    ids, found = tiles.top_k_tokens(hidden, Head(kernel, *KINDS[kind]), 3)
    values, want = jax.lax.top_k(jax.nn.log_softmax(logits(hidden, kernel, *KINDS[kind])), 3)
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_decodes_with_the_logits_it_is_trained_on(tied):
    model = tiny_model("*-GKA", logits_scaling=0.5, logits_soft_cap=2.0, tie_embeddings=tied)
    ids = np.arange(1, 13)[None] % 61
    found = model(ids)
    assert found.dtype == jnp.float32 and float(jnp.max(jnp.abs(found))) < 2
    batch = training_batch({"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": np.ones(ids.shape, np.float32)})
    loss = OBJECTIVES["next_token"](model, batch).loss
    want = -jnp.mean(jax.nn.log_softmax(found[0, :-1])[jnp.arange(11), ids[0, 1:]])
    assert float(loss.total / loss.weight) == pytest.approx(float(want), rel=1e-5)
    hidden, kernel = model.hidden_states(ids)[0], model.embed_tokens.embedding[...].T if tied else model.lm_head.kernel[...]
    assert relative_error(found, logits(hidden, kernel, 0.5, 2.0)) < 1e-5


@pytest.mark.parametrize("option", ["logits_scaling", "logits_soft_cap"])
def test_a_head_that_nobody_can_mean_is_refused(option):
    with pytest.raises(ValueError, match=option):
        tiny_config("*", **{option: 0.0})
