"""Measures and layer scores against plain numpy on the model's logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from hybrid_jax.config import SWAConfig
from hybrid_jax.data.corpus import Corpus, Source
from hybrid_jax.data.tokens import Tokens
from hybrid_jax.evaluate.measures import batch_sums, held_out_rows, retrieval_rows
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.selection.select import Selection, score_layers
from tests.conftest import loss_and_accuracy, tiny_model

LENGTH, ROWS = 24, 10  # more rows than a batch, and the last batch is not full


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    starts = np.asarray([0, 17, 100, 250])
    tokens = Tokens(rng.integers(0, 61, starts[-1]).astype(np.uint16), starts)
    return Corpus(Tokenizer(models.BPE()), {"text": Source("", "split")}, {"text": [tokens]}, {"text": [tokens]}, (1, 2), (3, 60))


def measured(model, rows):
    """(mean loss, accuracy) of the weighted tokens, from the logits of every row alone, in float64."""
    losses, right, weights = [], [], []
    for row in rows:
        logits = np.asarray(model(row["input_ids"][None], row["segment_ids"][None])[0], np.float64)[:-1]
        targets = row["input_ids"][1:]
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets])
        right.append(logits.argmax(-1) == targets)
        weights.append(row["loss_weights"][1:])
    return np.average(losses, weights=weights), np.average(right, weights=weights)


def test_text_loss_is_the_mean_over_the_weighted_tokens_of_evenly_spaced_rows(corpus):
    model, rows = tiny_model("*-GKA"), corpus.held_out_rows(LENGTH)
    assert len(rows) == 10
    assert loss_and_accuracy(model, held_out_rows(corpus, LENGTH, ROWS))[0] == pytest.approx(measured(model, rows)[0], rel=1e-5)
    batch_sums.clear_cache()
    loss_and_accuracy(model, held_out_rows(corpus, LENGTH, ROWS))[0]
    assert batch_sums._cache_size() == 1  # the last batch, which is not full, needs no program of its own
    three = [rows[i] for i in (0, 4, 9)]
    assert loss_and_accuracy(model, held_out_rows(corpus, LENGTH, 3))[0] == pytest.approx(measured(model, three)[0], rel=1e-5)


def test_retrieval_counts_only_the_values_asked_for(corpus):
    model = tiny_model("*-*", seed=3)
    rows = [corpus.task("retrieval", LENGTH, 987_654_321, min_pairs=5, max_pairs=5)[i] for i in range(ROWS)]
    assert all(row["loss_weights"].sum() == 5 for row in rows)
    loss, accuracy = loss_and_accuracy(model, retrieval_rows(corpus, LENGTH, ROWS, pairs=5))
    want = measured(model, rows)
    assert (loss, accuracy) == (pytest.approx(want[0], rel=1e-5), pytest.approx(want[1]))


def test_a_layers_score_is_the_loss_that_replacing_it_adds(corpus):
    model = tiny_model("*-*")
    attention = model.layers[1].self_attn
    attention.o_proj.kernel[...] = jnp.zeros_like(attention.o_proj.kernel[...])  # a layer that does nothing costs nothing
    selection = Selection(options=dict(window=2, rows=4, seq_len=90))

    def loss(model):
        packed = corpus.rows("text", 90, 0)
        text = [packed[i] for i in np.unique(np.linspace(0, len(packed) - 1, 4).astype(int))]
        retrieval = [corpus.task("retrieval", 90, 876_543_210, min_pairs=16, max_pairs=16)[i] for i in range(4)]
        return measured(model, text)[0] + measured(model, retrieval)[0]

    scores = score_layers(model, corpus, selection).per_layer()
    narrow = join_model(*split_model(model))
    narrow.config = model.config.with_options(SWAConfig(2))
    windowed = initialize_hybrid(narrow, "SWA-*")
    assert scores[0] == pytest.approx(loss(windowed) - loss(model), abs=1e-5) and abs(scores[0]) > 1e-3
    assert scores[1] == pytest.approx(0, abs=1e-6)
    assert model.config.options(SWAConfig).window_size == 6  # the caller's model is as it was
