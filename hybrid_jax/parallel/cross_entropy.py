"""Next-token cross-entropy that never holds the logits of all tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.head import Head
from hybrid_jax.parallel.tiles import Vocabulary, loss_of_logits


def cross_entropy(hidden: jax.Array, head: Head | jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log softmax(logits)[target] of every token, in nats; the softmax is in float32.

    Args:
      hidden: [B, T, hidden] in the compute dtype.
      head: the model's head, or the kernel [hidden, vocab] of a plain one.
      targets: [B, T] token ids.

    Returns:
      [B, T] float32.
    """
    return loss_of_logits(_value, _slope, hidden, head, (targets,))


def _is_target(vocabulary: Vocabulary, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns [tile, local vocab] True where the column is the target [tile] of its token."""
    size = logits.shape[-1]
    return vocabulary.local(targets, size)[:, None] == jnp.arange(size)


def _value(vocabulary: Vocabulary, logits: jax.Array, tokens: tuple[jax.Array], _) -> tuple[jax.Array, jax.Array]:
    """Returns the losses [tile] and what `_slope` needs, the log-sum-exps [tile, 1]; see `loss_of_logits`."""
    lse = vocabulary.log_sum_exp(logits)
    own = vocabulary.sum(jnp.sum(jnp.where(_is_target(vocabulary, logits, *tokens), logits, 0), axis=-1))
    return lse[:, 0] - own, lse


def _slope(vocabulary: Vocabulary, logits: jax.Array, lse: jax.Array, tokens: tuple[jax.Array], _) -> jax.Array:
    """Returns d loss / d logits, [tile, local vocab]."""
    return jnp.exp(logits - lse) - _is_target(vocabulary, logits, *tokens)
