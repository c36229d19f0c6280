"""Divergence from a teacher: the textbook's sums and their gradients, whatever the tile; known from its top-k tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.parallel import divergence, tiles
from hybrid_jax.parallel.divergence import top_k_divergence
from tests.conftest import relative_error

B, T, D, V = 2, 7, 12, 33


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, D), (D, V), (B, T, D), (D, V), (B, T))]


def textbook(hidden, kernel, teacher, teacher_kernel, kind, temperature):
    log_p, log_q = (jax.nn.log_softmax(h @ k / temperature) for h, k in ((hidden, kernel), (teacher, teacher_kernel)))
    if kind == "reverse":
        log_p, log_q = log_q, log_p
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


@pytest.mark.parametrize("kind", divergence.KINDS)
@pytest.mark.parametrize("tile, temperature", [(3, 1.0), (2048, 2.5)])
def test_divergence_and_its_gradient_are_the_textbook_s(monkeypatch, kind, tile, temperature):
    monkeypatch.setattr(tiles, "TILE", tile)
    hidden, kernel, teacher, teacher_kernel, d = arrays()

    def ours(hidden, kernel):
        return divergence.divergence(hidden, kernel, teacher, teacher_kernel, kind=kind, temperature=temperature)

    got, pull = jax.vjp(ours, hidden, kernel)
    want, pull_want = jax.vjp(lambda h, k: textbook(h, k, teacher, teacher_kernel, kind, temperature), hidden, kernel)
    assert relative_error(got, want) < 1e-5
    for a, b in zip(pull(d), pull_want(d), strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_teacher_is_at_no_distance_from_itself_and_takes_no_gradient():
    hidden, kernel, *_ = arrays()

    def to_itself(teacher):
        return jnp.sum(divergence.divergence(hidden, kernel, teacher, kernel))

    value, gradient = jax.value_and_grad(to_itself)(hidden)
    assert abs(float(value)) < 1e-5 and not np.asarray(gradient).any()


def known(teacher, teacher_kernel, k):
    log_q, ids = jax.lax.top_k(jax.nn.log_softmax(teacher @ teacher_kernel), k)
    return ids, log_q


def test_all_tokens_known_is_the_whole_divergence():
    hidden, kernel, teacher, teacher_kernel, _ = arrays()
    got = top_k_divergence(hidden, kernel, *known(teacher, teacher_kernel, V))
    assert relative_error(got, textbook(hidden, kernel, teacher, teacher_kernel, "forward", 1.0)) < 1e-4


@pytest.mark.parametrize("tile", [3, 2048])
def test_the_top_k_tokens_and_the_rest_as_one_event(monkeypatch, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    hidden, kernel, teacher, teacher_kernel, d = arrays()
    ids, log_q = known(teacher, teacher_kernel, 4)

    def events(hidden, kernel):
        p = jnp.take_along_axis(jax.nn.softmax(hidden @ kernel), ids, axis=-1)
        p, q = (jnp.concatenate([x, 1 - jnp.sum(x, axis=-1, keepdims=True)], axis=-1) for x in (p, jnp.exp(log_q)))
        return jnp.sum(q * (jnp.log(q) - jnp.log(p)), axis=-1)

    got, pull = jax.vjp(lambda h, k: top_k_divergence(h, k, ids, log_q), hidden, kernel)
    want, pull_want = jax.vjp(events, hidden, kernel)
    assert relative_error(got, want) < 1e-5
    for a, b in zip(pull(d), pull_want(d), strict=True):
        assert relative_error(a, b) < 1e-4


def events_in_float64(logits, ids, log_q):
    """The divergence over the known tokens and the rest, and its gradient by the logits, by their definitions."""
    logits, q = np.asarray(logits, np.float64), np.exp(np.asarray(log_q, np.float64))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    known = np.zeros(p.shape, bool)
    np.put_along_axis(known, np.asarray(ids), True, axis=-1)
    spread = np.zeros(p.shape)
    np.put_along_axis(spread, np.asarray(ids), q, axis=-1)
    rest_p, rest_q = np.where(known, 0, p).sum(-1), 1 - q.sum(-1)
    p_known = np.take_along_axis(p, np.asarray(ids), axis=-1)
    value = (q * np.log(q / p_known)).sum(-1) + rest_q * np.log(rest_q / rest_p)
    return value, p - np.where(known, spread, p * (rest_q / rest_p)[..., None])


@pytest.mark.parametrize("gap", [1.0, 10.0, 25.0, 60.0])
def test_the_rest_of_a_confident_student_is_as_exact_as_in_float64(gap):
    """Its known tokens stand `gap` nats above all others: of 1 - sum p nothing is left in float32."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 5, V)).astype(np.float32)
    ids = np.argsort(rng.normal(size=(1, 5, V)), axis=-1)[..., :3]
    np.put_along_axis(logits, ids, np.take_along_axis(logits, ids, axis=-1) + np.float32(gap), axis=-1)
    log_q = jnp.log(jnp.asarray([0.5, 0.3, 0.15], jnp.float32) * jnp.ones((1, 5, 3)))
    got, pull = jax.vjp(lambda x: top_k_divergence(x, jnp.eye(V), ids, log_q), jnp.asarray(logits))
    value, slope = events_in_float64(logits, ids, log_q)
    assert relative_error(got, value) < 5e-6
    assert relative_error(pull(jnp.ones((1, 5)))[0], slope) < 5e-6


def test_logits_of_all_tokens_never_exist():
    tokens, vocab = 4 * tiles.TILE, 1000
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, tokens, 8), (8, vocab), (1, tokens, 8), (8, vocab))]
    step = jax.jit(jax.grad(lambda *x: jnp.sum(divergence.divergence(*x)), argnums=(0, 1)))
    assert step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 4 * tokens * vocab
