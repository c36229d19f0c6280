"""A source whose layers differ in ways that every scorer must see, and the scores of it."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.parameters import split_model
from hybrid_jax.selection.scorers import find_scorer
from tests.conftest import tiny_model

OPTIONS = dict(window=3, rows=4, seq_len=68)
OF_HEADS = {"attention_distance": {"per_head": True}}


class Scored:
    """`three_layers`, and its scores by name of the scorer, each computed when it is first asked for."""

    def __init__(self, corpus):
        self.corpus, self.model = corpus, three_layers(corpus.tokenizer.get_vocab_size())
        self.before = {name: np.array(value) for name, value in split_model(self.model)[1].items()}

    @functools.cache  # noqa: B019 (one object per module)
    def scores(self, name):
        return find_scorer(name)(**options_of(name)).score(self.model, self.corpus, None)


def three_layers(vocab_size):
    """Layer 0: attention as drawn, without its last head. Layer 1: queries are 0, so that attention is the mean over all keys.
    Layer 2: every token attends to itself alone."""
    model = tiny_model("*-*-*", vocab_size=vocab_size, attention_windows=(None, None, 1))
    first, second = model.layers[0].self_attn, model.layers[1].self_attn
    first.o_proj.kernel.set_value(first.o_proj.kernel[...].at[-8:].set(0))
    second.q_norm.weight.set_value(jnp.zeros_like(second.q_norm.weight[...]))
    return model


def options_of(name):
    """Returns those of `OPTIONS` that a scorer has, and its own."""
    known = {field.name for field in dataclasses.fields(find_scorer(name))}
    return {key: value for key, value in OPTIONS.items() if key in known} | OF_HEADS.get(name, {})


@pytest.fixture(scope="module")
def scored(corpus) -> Scored:
    return Scored(corpus)
