"""Kullback-Leibler divergence from a teacher's next-token distribution, tile by tile like `cross_entropy`.

Neither model's logits exist for all tokens. Only the student takes gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.tiles import logits_of, loss_of_logits

KINDS = ("forward", "reverse")
REST = 1e-9  # the least probability of all unknown tokens together


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

    Args:
      hidden, head: as in `divergence`.
      ids, log_probabilities: [B, T, k], distinct ids.

    Returns:
      [B, T].
    """
    return loss_of_logits(_top_k_value, _top_k_slope, hidden, head, (ids, jax.lax.stop_gradient(log_probabilities)))


def _known(vocabulary, logits, lse, ids):
    """(places of the known tokens in this part of the vocabulary, which are here, their log p there)."""
    here = vocabulary.local(ids, logits.shape[-1])
    inside = (here >= 0) & (here < logits.shape[-1])
    place = jnp.where(inside, here, 0)
    return place, inside, jnp.take_along_axis(logits, place, axis=-1) - lse


def _top_k_value(vocabulary, logits, tokens, _):
    (ids, log_q), lse = tokens, vocabulary.log_sum_exp(logits)
    _, inside, log_p = _known(vocabulary, logits, lse, ids)
    log_p, q = vocabulary.sum(jnp.where(inside, log_p, 0)), jnp.exp(log_q)
    rest_p, rest_q = (jnp.maximum(1 - jnp.sum(x, axis=-1), REST) for x in (jnp.exp(log_p), q))
    found = jnp.sum(q * (log_q - log_p), axis=-1) + rest_q * (jnp.log(rest_q) - jnp.log(rest_p))
    return found, (lse, rest_q / rest_p)


def _top_k_slope(vocabulary, logits, kept, tokens, _):
    """p - q of the known tokens, p (1 - rest q / rest p) of all others."""
    (ids, log_q), (lse, share) = tokens, kept
    place, inside, log_p = _known(vocabulary, logits, lse, ids)
    share, row = share[:, None], jnp.arange(len(ids))[:, None]
    known = jnp.where(inside, jnp.exp(log_p) * share - jnp.exp(log_q), 0)
    return (jnp.exp(logits - lse) * (1 - share)).at[row, place].add(known)
