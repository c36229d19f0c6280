"""Next-token cross-entropy that never holds the logits of all tokens."""

from __future__ import annotations

import jax.numpy as jnp

from hybrid_jax.parallel.tiles import loss_of_logits


def cross_entropy(hidden, head, targets):
    """-log softmax(hidden head)[target] of every token, in nats, float32; softmax in float32.

    Args:
      hidden: [B, T, hidden] in the compute dtype.
      head: [hidden, vocab].
      targets: [B, T] int.

    Returns:
      [B, T].
    """
    return loss_of_logits(_value, _slope, hidden, head, (targets,))


def _is_target(vocabulary, logits, targets):
    size = logits.shape[-1]
    return vocabulary.local(targets, size)[:, None] == jnp.arange(size)


def _value(vocabulary, logits, tokens, _):
    lse = vocabulary.log_sum_exp(logits)
    own = vocabulary.sum(jnp.sum(jnp.where(_is_target(vocabulary, logits, *tokens), logits, 0), axis=-1))
    return lse[:, 0] - own, lse


def _slope(vocabulary, logits, lse, tokens, _):
    return jnp.exp(logits - lse) - _is_target(vocabulary, logits, *tokens)
