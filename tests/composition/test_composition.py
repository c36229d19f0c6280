"""Composing caches and states: exact where it must be, published formulas by enumeration, bad values refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import generate
from hybrid_jax.composition import Composition, compose, composed_scores, generate_composed
from hybrid_jax.composition.states import mean_products
from hybrid_jax.config import BMojoConfig, GKAConfig, Mamba3Config
from tests.conftest import relative_error, tiny_config, tiny_model

AFTER = 4
RIDGE = GKAConfig(chunk_size=16, ridge_strength=0.5)  # so that the solve does not multiply float32's rounding by 50


def tokens(count, rows=1, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (rows, count))


def states_of(model, context, *names, prefix=(), chunk=5):
    found = compose(model, context, [Composition.parse(name, chunk) for name in names], prefix=prefix, after=AFTER)
    return [state for state, _ in found]


def error(got, want):
    return max(relative_error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def one_by_one(model, context, prefix, chunk):
    """The states of ordinary passes over the prefix and each chunk alone."""
    rows = [np.concatenate([prefix, context[:, i : i + chunk]], axis=1) for i in range(0, context.shape[1], chunk)]
    return [states_of(model, row, "full:ordinary")[0] for row in rows]


@pytest.mark.parametrize("pattern, chunk, length", [("GKA", 2, 5), ("GDN", 4, 11), ("M2", 2, 5), ("DM2", 4, 11), ("M3", 4, 11)])
def test_exact_composition_of_one_recurrent_layer_is_the_ordinary_pass(pattern, chunk, length):
    # the last chunk is shorter, and chunks of 2 and of 1 token are shorter than a convolution's tail
    model, context, prefix = tiny_model(pattern, mamba3=Mamba3Config(rank=2)), tokens(length, 2), tokens(3, 2, seed=1)
    exact, ordinary = states_of(model, context, "full:exact", "full:ordinary", prefix=prefix, chunk=chunk)
    assert error(exact, ordinary) < 1e-5


def folded(transitions, states, order):
    """What chunks in this order make of nothing, S <- A S + b."""
    S = np.zeros_like(states[0])
    for i in order:
        A = transitions[i]
        S = (A @ S if np.ndim(A) else A * S) + states[i]
    return S


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_fusion_of_decays_is_the_mean_over_all_orders_of_the_chunks(chunks):
    rng = np.random.default_rng(chunks)
    decays, states = rng.uniform(0, 1, chunks), rng.normal(size=(chunks, 3, 2))
    weights = np.asarray(mean_products(jnp.asarray(decays, jnp.float32), matrices=False))
    want = np.mean([folded(decays, states, order) for order in itertools.permutations(range(chunks))], axis=0)
    assert relative_error(np.einsum("n,nkv->kv", weights, states), want) < 1e-6


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_fusion_by_matrices_takes_the_products_of_later_chunks_in_their_order(chunks):
    rng = np.random.default_rng(chunks)
    A, states = rng.normal(size=(chunks, 3, 3)), rng.normal(size=(chunks, 3, 2))
    got = np.einsum("nkl,nlv->kv", np.asarray(mean_products(jnp.asarray(A, jnp.float32), matrices=True)), states)
    want = np.zeros((3, 2))
    for i in range(chunks):
        others = [j for j in range(chunks) if j != i]
        for m in range(chunks):
            chosen = list(itertools.combinations(others, m))
            products = [np.linalg.multi_dot([np.eye(3), *A[list(reversed(js))], np.eye(3)]) for js in chosen]
            want += np.mean(products, axis=0) @ states[i] / chunks
    assert relative_error(got, want) < 1e-5
    if chunks == 2:  # one choice of each size: the mean over both orders
        assert relative_error(got, (folded(A, states, (0, 1)) + folded(A, states, (1, 0))) / 2) < 1e-5


def test_many_chunks_that_forget_nothing_are_fused_with_weights_of_one():
    # 200 over 100 is more than float32 holds
    np.testing.assert_allclose(mean_products(jnp.ones(201), matrices=False), 1, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["GDN", "M2"])
def test_two_fused_chunks_are_the_mean_of_both_orders_in_a_model_too(pattern):
    model, context, prefix = tiny_model(pattern), tokens(10), tokens(3, seed=1)
    (fused,) = states_of(model, context, "concat:fuse", prefix=prefix)
    alone = one_by_one(model, context, prefix, 5)

    @nnx.jit
    def after(model, rows, S):
        """S after the prefix and a chunk, whose convolution reads nothing before them."""
        empty = model.init_state(1, 8)[0]
        return model.hidden_states(jnp.concatenate([prefix, rows], axis=1), state=(empty._replace(S=S),))[1][0].S

    S1, S2 = (state[0].S for state in alone)
    want = (after(model, context[:, 5:], S1) + after(model, context[:, :5], S2)) / 2
    assert relative_error(fused[0].S, want) < 1e-5
    assert relative_error(S1 + S2, want) > 1e-3  # the decays matter
    for got, *tails in zip(fused[0][1:], alone[0][0][1:], alone[1][0][1:], strict=True):
        assert relative_error(got, (tails[0] + tails[1]) / 2) < 1e-6


def test_fusion_of_gated_kalmanet_is_the_sum_of_both_states():
    model, context, prefix = tiny_model("GKA"), tokens(15), tokens(3, seed=1)
    (fused,), alone = states_of(model, context, "concat:fuse", prefix=prefix), one_by_one(model, context, prefix, 5)
    for name in ("h_kk", "h_kv"):
        assert relative_error(getattr(fused[0], name), sum(getattr(s[0], name) for s in alone)) < 1e-5
    assert relative_error(fused[0].k_conv, sum(s[0].k_conv for s in alone) / 3) < 1e-5


def test_a_batch_of_chunks_leaves_what_each_leaves_alone():
    model, context, prefix = tiny_model("*-GKA-SWA-M2"), tokens(15, 2), tokens(3, 2, seed=1)
    (soup,), alone = states_of(model, context, "concat:soup", prefix=prefix), one_by_one(model, context, prefix, 5)
    for layer in (1, 3):
        mean = jax.tree.map(lambda *x: sum(x) / 3, *(s[layer] for s in alone))
        assert error(soup[layer], mean) < 1e-5
    for name in ("k", "v", "positions", "segment_ids"):
        rows = [np.asarray(getattr(s[0], name)) for s in alone]
        want = np.concatenate([rows[0][:, :3], *(row[:, 3:8] for row in rows)], axis=1)
        assert relative_error(getattr(soup[0], name)[:, :18], want) < 1e-5
        assert relative_error(getattr(soup[2], name)[:, -5:], getattr(alone[-1][2], name)[:, -5:]) < 1e-5
    assert int(soup[0].next_slot) == 18 and (np.asarray(soup[0].segment_ids)[:, 18:] == -1).all()


def test_the_mean_of_equal_chunks_is_the_chunk():
    model, chunk = tiny_model("GKA-GDN-DM2"), tokens(5)
    (soup,) = states_of(model, np.tile(chunk, 3), "sw:soup")
    assert error(soup, states_of(model, chunk, "full:ordinary")[0]) < 1e-5


def test_states_that_are_left_out_are_zero_with_their_tails():
    for state in states_of(tiny_model("M2-M3-*"), tokens(12), "full:kv_only", "sw:kv_only"):
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(state[:2])) and np.asarray(state[2].k).any()


@pytest.mark.parametrize("pattern", ["*-GKA-SWA", "GDN[1]-M2-BMF"])
def test_one_chunk_is_the_ordinary_pass_by_every_composition(pattern):
    model = tiny_model(pattern, gka=RIDGE, bmojo=BMojoConfig(4, "discrete_mamba2"))
    names = ("full:ordinary", "concat:soup", "concat:fuse", "concat:exact", "sw:soup")
    ordinary, *composed = states_of(model, tokens(11), *names, prefix=tokens(3, seed=1), chunk=11)
    assert max(error(state, ordinary) for state in composed) < 1e-5


def test_generation_goes_on_behind_a_composed_context():
    model, context, prefix, question = tiny_model("*-GKA", gka=RIDGE), tokens(11)[0], tokens(3, seed=1)[0], [4, 5]
    want = generate(model, [[*prefix, *context, *question]], max_new_tokens=6)[0]
    how = Composition("concat", "fuse", chunk=11)
    assert generate_composed(model, context, question, composition=how, prefix=prefix, max_new_tokens=6) == want


@nnx.jit
def logits_at(model, ids, positions):
    return model(ids, None, positions)


@pytest.mark.parametrize("keys", ["concat", "sw", "full"])
def test_the_question_reads_keys_at_the_positions_that_the_package_states(keys):
    # keys of one layer depend on no other token: the same keys in one pass, at those positions
    model, prefix, question = tiny_model("*"), tokens(3, seed=1), tokens(4, seed=2)
    context = tokens(14)  # two chunks of 5, one of 4
    ((state, first),) = compose(model, context, [Composition(keys, "soup", 5)], prefix=prefix, after=4)
    losses, right = composed_scores(model, question, (state, first))
    places = [range(3), range(3, 8), range(3, 8), range(4, 8), range(8, 12)]
    ids, where = np.concatenate([prefix, context, question], axis=1), np.concatenate(places)
    if keys == "full":
        where = np.arange(ids.shape[1])
    if keys == "sw":
        ids, where = np.delete(ids, range(3, 13), axis=1), np.delete(where, range(3, 13))
    assert first == where[-4]
    logits = np.asarray(logits_at(model, ids, where[None].astype(np.int32)), np.float64)[0, -4:-1]
    want = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), question[0, 1:]]
    np.testing.assert_allclose(losses[0], [0, *want], atol=1e-5)
    assert right[0].tolist() == [False, *(logits.argmax(-1) == question[0, 1:])]


def test_windows_keep_the_last_chunk_s():
    model, question = tiny_model("SWA-BMF", bmojo=BMojoConfig(4, "gka")), tokens(4, seed=2)
    context = tokens(24)
    composed, alone = (
        compose(model, rows, [Composition("concat", "kv_only", 12)], after=4)[0] for rows in (context, context[:, 12:])
    )
    losses = [composed_scores(model, question, found)[0] for found in (composed, alone)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Composition.parse("concat"), "a composition is KEYS:STATES.*got 'concat'"),
        (lambda: Composition.parse("most:soup"), "keys and values must be one of 'full', 'concat', 'sw', got 'most'"),
        (lambda: Composition.parse("sw:mean"), "of states must be one of .*'exact'.*got 'mean'"),
        (lambda: Composition("sw", "ordinary"), "go with 'full' only, got 'sw:ordinary'"),
        (lambda: Composition(chunk=0), "chunk must be an integer at least 1, got 0"),
        (lambda: Composition().check(tiny_config("*-M3")), r"layer 1 \(M3\).*M3 cannot be composed by 'soup'.*exact"),
        (
            lambda: Composition().check(tiny_config("BMF", bmojo=BMojoConfig(4, "mamba3"))),
            r"layer 0 \(BMF\).*M3 cannot be composed by 'soup'",
        ),
        (
            lambda: Composition(chunk=250).check_positions(tiny_config("*"), 3, 500, 4),
            "need 257 positions, more than the model's 256",
        ),
        (lambda: Composition("full", chunk=5).check_positions(tiny_config("*"), 3, 250, 4), "need 257 positions"),
        (lambda: compose(tiny_model("*"), [], [Composition()], after=1), "the context is empty"),
        (lambda: compose(tiny_model("*"), [61], [Composition()], after=1), r"context has a token id outside 0 \.\.\. 60"),
        (lambda: compose(tiny_model("*"), [0.5], [Composition()], after=1), "context must be integer token ids"),
        (lambda: compose(tiny_model("*"), [1, 2], [], after=1), "at least one composition"),
        (lambda: compose(tiny_model("*"), [1, 2], [Composition(), Composition(chunk=1)], after=1), "all with chunks of one size"),
        (lambda: compose(tiny_model("*"), tokens(4, 3), [Composition()], prefix=tokens(2, 2), after=1), "prefix has 2 rows"),
        (lambda: compose(tiny_model("*"), tokens(250), [Composition("full", chunk=5)], after=7), "need 257 positions"),
        (lambda: generate_composed(tiny_model("*"), [1, 2], [], composition=Composition()), "at least one token"),
        (lambda: generate_composed(tiny_model("*"), tokens(4, 2), [1], composition=Composition()), "continues one context"),
    ],
)
def test_what_cannot_be_composed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
