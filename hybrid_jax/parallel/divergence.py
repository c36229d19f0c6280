"""Kullback-Leibler divergence from a teacher's next-token distribution, tile by tile like `cross_entropy`.

Neither model's logits exist for all tokens. Only the student takes gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.head import Head, as_head
from hybrid_jax.parallel.tiles import Vocabulary, loss_of_logits

KINDS = ("forward", "reverse")
EXCLUDED = -1e30  # the logit of a token that is left out of a log-sum-exp


def divergence(
    hidden: jax.Array,
    head: Head | jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: Head | jax.Array,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
) -> jax.Array:
    """Returns KL(teacher | student), or KL(student | teacher) for `kind="reverse"`, of every token, in nats.

    Both distributions are softmax(logits / temperature); nothing is multiplied by temperature^2.

    Args:
      hidden, teacher_hidden: [B, T, hidden] final states.
      head, teacher_head: the models' heads, or the kernels [hidden, vocab] of plain ones; they may be the same.
      kind: `forward` or `reverse`.
      temperature: what both models' logits are divided by.

    Returns:
      [B, T].
    """

    teacher = as_head(teacher_head)

    def log_probabilities(vocabulary: Vocabulary, logits: jax.Array, lse: jax.Array | None = None):
        """Returns log softmax(logits / temperature) [tile, local vocab] and its log-sum-exp [tile, 1]."""
        logits = logits / temperature
        lse = vocabulary.log_sum_exp(logits) if lse is None else lse
        return logits - lse, lse

    def both(vocabulary: Vocabulary, logits: jax.Array, tokens, constants, kept=(None, None)):
        """Returns the student's and the teacher's log-probabilities, and their log-sum-exps."""
        (hidden,) = tokens
        own, own_lse = log_probabilities(vocabulary, logits, kept[0])
        other, other_lse = log_probabilities(vocabulary, teacher.with_arrays(*constants)(hidden), kept[1])
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

    fixed, arrays = jax.lax.stop_gradient((teacher_hidden, teacher.arrays(hidden.dtype)))
    return loss_of_logits(value, slope, hidden, head, (fixed,), arrays)


def top_k_divergence(hidden: jax.Array, head: Head | jax.Array, ids: jax.Array, log_probabilities: jax.Array) -> jax.Array:
    """Returns KL(teacher | student) of every token, in nats, given the teacher's top-k tokens; all others count as one event.

    The student's probability of the others is summed over them, not 1 minus the sum over the known ones, which would cancel for
    a confident student. The teacher's is 1 minus the sum of what is known.

    Args:
      hidden, head: as in `divergence`.
      ids, log_probabilities: [B, T, k] of the teacher's top-k tokens; the ids of a token are distinct.

    Returns:
      [B, T] float32.
    """
    return loss_of_logits(_top_k_value, _top_k_slope, hidden, head, (ids, jax.lax.stop_gradient(log_probabilities)))


def _known(vocabulary: Vocabulary, logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Finds the known tokens ids [tile, k] in this device's shard of the vocabulary.

    Returns:
      (inside [tile, k], which of them the shard holds; an index into `logits` of their columns, which for the others is past the
      end, so that `mode="drop"` and `mode="fill"` skip them).
    """
    size = logits.shape[-1]
    here = vocabulary.local(ids, size)
    inside = (here >= 0) & (here < size)
    return inside, (jnp.arange(len(ids))[:, None], jnp.where(inside, here, size))


def _top_k_value(vocabulary: Vocabulary, logits: jax.Array, tokens, _) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the losses [tile] and what `_top_k_slope` needs, [tile, 1] each; see `loss_of_logits`."""
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


def _top_k_slope(vocabulary: Vocabulary, logits: jax.Array, kept, tokens, _) -> jax.Array:
    """Returns d loss / d logits [tile, local vocab]: p - q for the known tokens, p - rest_q * p / rest_p for the others.

    The q's sum to 1, or to a little more because they are rounded; `total` accounts for that.
    """
    (ids, log_q), (lse, lse_rest, rest_q) = tokens, kept
    q = jnp.exp(log_q)
    _, at = _known(vocabulary, logits, ids)
    total = jnp.sum(q, axis=-1, keepdims=True) + rest_q
    rest = rest_q * jnp.exp(logits.at[at].set(EXCLUDED, mode="drop") - lse_rest)
    return (total * jnp.exp(logits - lse) - rest).at[at].add(-q, mode="drop")
