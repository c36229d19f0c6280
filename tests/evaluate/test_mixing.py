"""The instrument of mixing matrices: heads that were built for a role have it, and every number is that of the matrices."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.instruments.contract import Subject
from hybrid_jax.evaluate.instruments.mixing import add_roles
from hybrid_jax.layers.rope import cos_sin, rope_frequencies, rotate
from hybrid_jax.parallel.sequence import positions_of
from tests.conftest import tiny_config, tiny_model

OPTIONS = dict(instrument="mixing", task="retrieval", seq_len=26, rows=3, batch_size=2, options={"max_pairs": 3})


def measured(model, corpus, **changes):
    instrument = make_instrument("x", OPTIONS | changes)
    instrument.check(model.config, corpus)
    found = instrument.measure(Subject(model, corpus.tokenizer, corpus))
    return {(m.measure, *m.at.values()): m for m in found}


def looking_back(distance, config, size=500.0):
    """A query that scores a constant key highest `distance` tokens back, whatever the tokens are."""
    inv_freq, factor = rope_frequencies(config.rope, config.head_dim, config.max_position_embeddings)
    key = jnp.concatenate([jnp.ones(4), jnp.zeros(4)])
    return key, size * rotate(key[None, None, None], *cos_sin(jnp.array([[-distance]]), inv_freq, factor))[0, 0, 0]


def test_heads_that_were_built_for_a_role_have_it(corpus):
    """`<pairs> key value <ask> key value`: the value is one token behind its key, and two before the token that predicts it."""
    model = tiny_model("*", vocab_size=corpus.tokenizer.get_vocab_size(), qk_norm=False)
    attention, config = model.layers[0].mixer("attention"), model.config
    model.embed_tokens.embedding.set_value(jnp.ones_like(model.embed_tokens.embedding[...]))  # every token is 1, ..., 1
    key, back = looking_back(2, config)
    queries = [jnp.zeros(8), back, looking_back(1, config)[1], looking_back(0, config)[1]]

    def constant(vectors):
        return jnp.tile(jnp.concatenate(vectors)[None] / config.hidden_size, (config.hidden_size, 1))

    attention.q_proj.kernel.set_value(constant(queries))
    attention.k_proj.kernel.set_value(constant([key, key]))
    found = measured(model, corpus, options={"min_pairs": 1, "max_pairs": 1}, seq_len=13)
    shares = {key[0::2]: m.value for key, m in found.items() if len(key) == 3}  # (measure, head)
    equal, aggregates, gathers, itself = range(4)
    assert shares["sharpness", equal] == pytest.approx(0, abs=1e-5)
    assert shares["largest share", equal] == pytest.approx(np.mean([1 / n for n in range(2, 7)]), rel=1e-5)
    assert shares["gather", equal] == pytest.approx(1 / 3) and shares["aggregate", equal] == pytest.approx(1 / 5)
    for head, gather, aggregate in ((aggregates, 0, 1), (gathers, 1, 0), (itself, 0, 0)):
        assert shares["gather", head] == pytest.approx(gather, abs=1e-5)
        assert shares["aggregate", head] == pytest.approx(aggregate, abs=1e-5)
        assert shares["sharpness", head] == pytest.approx(1, abs=1e-4)


@nnx.jit
def matrices_and_next(layer, hidden, at):
    """|M| [B, H, T, T] of a layer's heads, and the layer's output."""
    x = layer.input_layernorm(hidden)
    return abs(layer.mixer(layer.spec.kind).mixing(x, **at).matrix()), layer.run(layer.spec.kind, hidden, **at)[0].hidden


def test_every_number_is_that_of_the_matrices(corpus):
    model = tiny_model("*-GDN-GDN[2]", vocab_size=corpus.tokenizer.get_vocab_size())
    found = measured(model, corpus)
    task = corpus.task("retrieval", 26, 987_654_321, held_out=True, max_pairs=3)
    rows = [task.example(i) for i in range(3)]
    ids, segments = (jnp.stack([jnp.asarray(row[name]) for row in rows]) for name in ("input_ids", "segment_ids"))
    hidden, at = model.inputs(ids, segments)
    totals, of_heads = {}, []
    symbols = (["*"] * 4, ["GDN"] * 4, ["GDN"] * 4 + ["*"])
    for layer, (of_layer, one) in enumerate(zip(symbols, model.layers, strict=True)):
        matrices, hidden = matrices_and_next(one, hidden, at)
        matrices = np.asarray(matrices, np.float64)
        for head, symbol in enumerate(of_layer):
            values = {"gather": [], "aggregate": [], "sharpness": [], "largest share": []}
            for row, M in zip(rows, matrices[:, head], strict=True):
                p, facts = M / M.sum(1, keepdims=True), set()
                for answer in np.flatnonzero(row["distances"]):
                    evidence = answer - row["distances"][answer]
                    values["aggregate"].append(p[answer - 1, evidence])
                    facts.add(evidence)
                values["gather"] += [p[fact, fact - 1] for fact in sorted(facts)]
                for t, n in enumerate(positions_of(row["segment_ids"][None])[0] + 1):
                    if row["segment_ids"][t] and n > 1:
                        seen = p[t, t + 1 - n : t + 1]
                        values["sharpness"].append(1 + (seen * np.log(np.where(seen > 0, seen, 1))).sum() / np.log(n))
                        values["largest share"].append(seen.max())
            number = 2 if head == 4 else None if (layer, head) == (2, 2) else head  # the kept head is shown in place of the mixer's
            for measure, each in values.items():
                if number is not None:
                    assert found[measure, layer, number].value == pytest.approx(np.mean(each), abs=2e-5), (measure, layer, head)
                    of_heads += [np.mean(each)] if measure == "sharpness" else []
                totals.setdefault((measure, symbol), []).append(np.mean(each))
    for (measure, symbol), each in totals.items():
        assert found[measure, symbol].value == pytest.approx(np.mean(each), abs=2e-5)
    assert found["sharpness",].value == pytest.approx(np.mean(of_heads), abs=2e-5) and len(of_heads) == 12
    assert found["sharpness",].low < found["sharpness",].value < found["sharpness",].high


def test_the_evidence_of_values_of_several_tokens_is_all_of_them():
    #                                  <pairs> k k v v v <ask> k k v v v
    distances = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 6, 6])
    row = add_roles({"distances": distances}, key_tokens=2)
    assert row["segment_begin"].tolist() == [0, 1, 2, 3, 4, 1, 6, 7, 8, 9, 10, 11]
    assert row["evidence_begin"].tolist() == [0] * 8 + [3, 3, 3, 0]
    assert row["evidence_end"].tolist() == [0] * 8 + [6, 6, 6, 0]
    two = add_roles({"distances": np.array([0, 0, 0, 0, 0, 4, 3])}, key_tokens=1)  # two answers in a row, of two facts
    assert two["segment_begin"].tolist() == [0, 0, 2, 2, 4, 5, 6] and two["evidence_begin"].tolist() == [0, 0, 0, 0, 1, 3, 0]
    none = add_roles({"distances": np.zeros(3, int)}, key_tokens=1)
    assert none["segment_begin"].tolist() == [0, 1, 2] and not none["evidence_end"].any()


def test_what_has_no_matrices_is_refused_before_any_work(corpus):
    instrument = make_instrument("x", OPTIONS)
    instrument.check(tiny_config("*-*"), corpus)
    with pytest.raises(ValueError, match="mixing: layer 1 .BMF. has no mixing matrices"):
        instrument.check(tiny_config("*-BMF"), corpus)
    with pytest.raises(ValueError, match="mixing: a fused model has two streams"):
        instrument.check(tiny_config("*-GKA").fused(), corpus)
    with pytest.raises(ValueError, match="mixing: no synthetic task is named 'nothing'"):
        make_instrument("x", OPTIONS | {"task": "nothing"}).check(tiny_config("*"), corpus)
    with pytest.raises(ValueError, match="instruments.x: rows must be an integer"):
        make_instrument("x", OPTIONS | {"rows": 0})
