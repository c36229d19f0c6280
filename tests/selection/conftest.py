"""A source whose layers differ in ways that every scorer must see, and the scores of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.parameters import split_model
from hybrid_jax.selection.scorers import SCORERS, find_scorer
from tests.conftest import tiny_model

OPTIONS = dict(window=3, rows=4, seq_len=68)
OF_HEADS = {"attention_distance": {"per_head": True}}


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model, the scorers that read it, their scores, and the model's parameters before and after."""

    model: object
    scorers: dict
    scores: dict
    before: dict
    after: dict


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
    """The scores of `three_layers` by every scorer that needs no file."""
    model = three_layers(corpus.tokenizer.get_vocab_size())
    before = {name: np.array(value) for name, value in split_model(model)[1].items()}
    scorers = {name: find_scorer(name)(**options_of(name)) for name in SCORERS if name != "score_file"}
    scores = {name: scorer.score(model, corpus, None) for name, scorer in scorers.items()}
    return Scored(model, scorers, scores, before, split_model(model)[1])
