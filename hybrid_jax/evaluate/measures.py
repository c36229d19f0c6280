"""What is measured: negative log-likelihood of held-out text, and recall of key-value pairs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.data import HELD_OUT_SEED, Corpus
from hybrid_jax.data.layout import training_batch
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import join_model, split_model

BATCH = 8
PAIRS = 16  # of a retrieval block
BLOCK = 4 * PAIRS + 2  # its tokens


@functools.partial(jax.jit, static_argnums=0)
def batch_sums(structure, parameters, batch):
    """[sum of weight * loss, sum of weight * (argmax is right), sum of weight]."""
    model, weights = join_model(structure, parameters), batch["weights"]
    hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
    losses = cross_entropy(hidden, model.head, batch["targets"])
    right = top_k_tokens(hidden, model.head, 1)[0][..., 0] == batch["targets"]
    return jnp.stack([jnp.sum(losses * weights), jnp.sum(right * weights), jnp.sum(weights)])


def _weighted_sums(model: Decoder, rows) -> tuple[float, float, float]:
    """`batch_sums` over all rows, in float64."""
    structure, parameters = split_model(model)
    total = np.zeros(3)
    rows = list(rows)
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        batch = {k: np.stack([r[k] for r in part]) for k in part[0]}
        short = BATCH - len(part)  # rows of weight 0 keep the batch's shape
        batch = {k: np.pad(v, ((0, short), (0, 0))) for k, v in batch.items()}
        total += np.asarray(batch_sums(structure, parameters, training_batch(batch)), np.float64)
    return tuple(total)


def evenly_spaced(available: int, rows: int) -> list[int]:
    """Returns the numbers of at most `rows` of the available rows."""
    return np.unique(np.linspace(0, available - 1, min(rows, available)).astype(int)).tolist()


def text_loss(model: Decoder, corpus: Corpus, seq_len: int, rows: int) -> float:
    """Mean loss in nats a token on `rows` evenly spaced rows of the held-out text."""
    held_out = corpus.held_out_rows(seq_len)
    loss, _, weight = _weighted_sums(model, (held_out[i] for i in evenly_spaced(len(held_out), rows)))
    return loss / weight


def retrieval_loss_and_accuracy(model: Decoder, corpus: Corpus, seq_len: int, rows: int, pairs: int = PAIRS):
    """Mean loss (nats) and accuracy of the values asked for, blocks of exactly `pairs` pairs."""
    task = corpus.retrieval(seq_len, HELD_OUT_SEED, min_pairs=pairs, max_pairs=pairs)
    loss, right, weight = _weighted_sums(model, (task[i] for i in range(rows)))
    return loss / weight, right / weight
