"""Kullback-Leibler divergence from a teacher's next-token distribution, tile by tile like `cross_entropy`.

Neither model's logits exist for all tokens. Only the student takes gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.tiles import logits_of, loss_of_logits

KINDS = ("forward", "reverse")
EXCLUDED = -1e30  # a logit that counts for nothing


def divergence(hidden, head, teacher_hidden, teacher_head, *, kind: str = "forward", temperature: float = 1.0):
    """KL(teacher | student), or KL(student | teacher) if `reverse`, of every token, in nats, float32.

    Both distributions are softmax(logits / temperature); nothing is multiplied by temperature^2.

    Args:
      hidden, teacher_hidden: [B, T, hidden] final states.
      head, teacher_head: [hidden, vocab]; may be the same array.

    Returns:
      [B, T].
    """

    def log_probabilities(vocabulary, logits, lse=None):
        logits = logits / temperature
        lse = vocabulary.log_sum_exp(logits) if lse is None else lse
        return logits - lse, lse

    def both(vocabulary, logits, tokens, constants, kept=(None, None)):
        own, own_lse = log_probabilities(vocabulary, logits, kept[0])
        other, other_lse = log_probabilities(vocabulary, logits_of(*tokens, *constants), kept[1])
        return own, other, (own_lse, other_lse)

    def value(vocabulary, logits, tokens, constants):
        own, other, lse = both(vocabulary, logits, tokens, constants)
        terms = jnp.exp(other) * (other - own) if kind == "forward" else jnp.exp(own) * (own - other)
        found = vocabulary.sum(jnp.sum(terms, axis=-1))
        return found, (lse, found)

    def slope(vocabulary, logits, kept, tokens, constants):
        lse, found = kept
        own, other, _ = both(vocabulary, logits, tokens, constants, lse)
        p = jnp.exp(own)
        return (p - jnp.exp(other) if kind == "forward" else p * (own - other - found[:, None])) / temperature

    teacher, constant = map(jax.lax.stop_gradient, (teacher_hidden, teacher_head.astype(hidden.dtype)))
    return loss_of_logits(value, slope, hidden, head, (teacher,), (constant,))


def top_k_divergence(hidden, head, ids, log_probabilities):
    """KL(teacher | student) where of the teacher only its k likeliest tokens are known, all others as one event.

    The student's probability of the others is summed over them, not 1 minus the sum over the known ones, which would cancel for
    a confident student. The teacher's is 1 minus the sum of what is known.

    Args:
      hidden, head: as in `divergence`.
      ids, log_probabilities: [B, T, k], distinct ids.

    Returns:
      [B, T].
    """
    return loss_of_logits(_top_k_value, _top_k_slope, hidden, head, (ids, jax.lax.stop_gradient(log_probabilities)))


def _known(vocabulary, logits, ids):
    """(which of the known tokens this part of the vocabulary has, their row and place there, beyond its end where it has not)."""
    size = logits.shape[-1]
    here = vocabulary.local(ids, size)
    inside = (here >= 0) & (here < size)
    return inside, (jnp.arange(len(ids))[:, None], jnp.where(inside, here, size))


def _top_k_value(vocabulary, logits, tokens, _):
    (ids, log_q), lse = tokens, vocabulary.log_sum_exp(logits)
    inside, at = _known(vocabulary, logits, ids)
    log_p = vocabulary.sum(jnp.where(inside, logits.at[at].get(mode="fill", fill_value=0) - lse, 0))
    lse_rest = vocabulary.log_sum_exp(logits.at[at].set(EXCLUDED, mode="drop"))
    q = jnp.exp(log_q)
    rest_q = jnp.maximum(1 - jnp.sum(q, axis=-1, keepdims=True), 0)
    rest_q = jnp.where(lse_rest > EXCLUDED / 2, rest_q, 0)  # else there are no others
    log_rest_q = jnp.log(jnp.where(rest_q > 0, rest_q, 1))
    found = jnp.sum(q * (log_q - log_p), axis=-1) + (rest_q * (log_rest_q - (lse_rest - lse)))[:, 0]
    return found, (lse, lse_rest, rest_q)


def _top_k_slope(vocabulary, logits, kept, tokens, _):
    """p - q of the known tokens; of all others p - rest q * p / rest p. (The q's sum is 1, or more by their rounding.)"""
    (ids, log_q), (lse, lse_rest, rest_q) = tokens, kept
    q = jnp.exp(log_q)
    _, at = _known(vocabulary, logits, ids)
    total = jnp.sum(q, axis=-1, keepdims=True) + rest_q
    rest = rest_q * jnp.exp(logits.at[at].set(EXCLUDED, mode="drop") - lse_rest)
    return (total * jnp.exp(logits - lse) - rest).at[at].add(-q, mode="drop")
