"""The instrument of heads: a removed head is one whose output is zero, in every mixer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.instruments.contract import Subject
from hybrid_jax.evaluate.token_scores import token_scores
from hybrid_jax.mixers import mixer_symbols
from tests.conftest import tiny_model

OPTIONS = dict(instrument="heads", task="needles", seq_len=48, rows=5, batch_size=4, options={"max_needles": 3})


def measured(model, corpus):
    instrument = make_instrument("x", OPTIONS)
    instrument.check(model.config, corpus)
    found = instrument.measure(Subject(model, corpus.tokenizer, corpus))
    return {(m.measure, *m.at.values()): m for m in found}


def outputs(model, layer):
    """The output projection of a layer's mixer, not that of a mixer inside it."""
    found = [(path, m) for path, m in nnx.iter_modules(model.layers[layer]) if path and path[-1] in ("o_proj", "out_proj")]
    return [m for path, m in found if "bmojo_f" not in path or "bmojo_attn" in path]


@pytest.mark.parametrize("pattern", ["*-*-*", "-".join(s for s in mixer_symbols() if s != "*"), "GDN[1,2,3]-M2[2]"])
def test_what_is_measured_is_the_model_whose_output_projection_does_not_read_the_head(corpus, pattern):
    vocabulary = corpus.tokenizer.get_vocab_size()
    found = measured(tiny_model(pattern, vocab_size=vocabulary), corpus)
    rows = make_instrument("x", OPTIONS).rows_on(corpus, 5)
    answers = np.stack([row["distances"] > 0 for row in rows])

    def by_hand(layer=None, head=None):
        model = tiny_model(pattern, vocab_size=vocabulary)
        for output in [] if layer is None else outputs(model, layer):
            kernel, kept = output.kernel[...], model.layers[layer].spec.attention_heads
            heads = range(4) if len(output.kernel[...]) == 32 else kept
            if head in heads:
                at = 8 * heads.index(head)
                output.kernel.set_value(kernel.at[at : at + 8].set(0))
        scores = token_scores(model, rows, batch_size=4)
        return scores.losses[answers].mean(), scores.right[answers].mean()

    loss, accuracy = by_hand()
    assert found["accuracy",].value == pytest.approx(accuracy) and found["chance",].value == pytest.approx(1 / 128)
    layers = pattern.count("-") + 1
    assert {key[1:] for key in found if len(key) == 3} == {(layer, head) for layer in range(layers) for head in range(4)}
    for layer, head in [(0, 0), (0, 3), (layers - 1, 1)] + [(layer, 2) for layer in range(layers)]:
        without, right = by_hand(layer, head)
        assert abs(without - loss) > 1e-4, "the head must matter for the test to tell"
        assert found["loss added", layer, head].value == pytest.approx(without - loss, abs=2e-5)
        assert found["accuracy", layer, head].value == pytest.approx(right)


def test_measuring_leaves_the_model_as_it_is_and_a_fused_one_is_refused(corpus):
    model = tiny_model("*-GKA", vocab_size=corpus.tokenizer.get_vocab_size())
    before = [jnp.array(output.kernel[...]) for layer in range(2) for output in outputs(model, layer)]
    measured(model, corpus)
    after = [output.kernel[...] for layer in range(2) for output in outputs(model, layer)]
    assert len(before) == 2 and all(map(np.array_equal, before, after))
    with pytest.raises(ValueError, match="heads: a fused model has two streams"):
        make_instrument("x", OPTIONS).check(model.config.fused(), corpus)
    with pytest.raises(ValueError, match="heads: no synthetic task is named 'nothing'"):
        make_instrument("x", OPTIONS | {"task": "nothing"}).check(model.config, corpus)
