"""Scorers that measure, against their formulas in numpy, on a source whose layers differ in known ways (`three_layers`)."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.data.layout import training_batch
from hybrid_jax.evaluate.instruments.heads import answer_rows
from hybrid_jax.parameters import split_model
from hybrid_jax.selection.compare import Compared, write_comparison
from hybrid_jax.selection.scorers import SCORERS
from hybrid_jax.selection.scorers.attention_distance import AttentionDistance
from hybrid_jax.selection.scorers.gradient_error import GradientError
from hybrid_jax.selection.scorers.head_ablation import HeadAblation
from hybrid_jax.selection.scorers.linear_fit import LinearFit
from hybrid_jax.selection.scorers.rows import OnRows
from hybrid_jax.selection.scorers.swa_retrieval import SwaRetrieval
from hybrid_jax.selection.scorers.uniform import Uniform
from tests.conftest import loss_and_accuracy, tiny_config, tiny_model
from tests.selection.conftest import OPTIONS, three_layers


@pytest.fixture(scope="module")
def activations(corpus, scored):
    """Of text and task: {weights [B, T], layers: of each (q, k, v [B, T, H, D], y [B, T, hidden]), distance and same [B, T, T]}."""
    rows, found = OnRows(OPTIONS["rows"], OPTIONS["seq_len"]), []
    for part in (rows.text_rows(corpus), rows.task_rows(corpus)):
        names = ("input_ids", "segment_ids", "loss_weights")
        batch = training_batch({name: np.stack([row[name] for row in part]) for name in names})
        hidden, at = scored.model.inputs(*(jnp.asarray(batch[n]) for n in ("input_ids", "segment_ids", "positions")))
        layers = []
        for layer in scored.model.layers:
            q, k, v = layer.self_attn.project(layer.input_layernorm(hidden), at["positions"])
            out = layer.run("attention", hidden, **at)[0]
            k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
            layers.append([np.asarray(x, np.float64) for x in (q, k, v, out.mixer)])
            hidden = out.hidden
        p, s = batch["positions"], batch["segment_ids"]
        distance, same = p[:, :, None] - p[:, None], s[:, :, None] == s[:, None]
        found.append(dict(weights=batch["weights"], layers=layers, distance=distance, same=same, positions=p))
    return found


def attention(part, layer):
    """Returns the attention of a layer, [B, H, T, T], from its definition."""
    q, k, _, _ = part["layers"][layer]
    seen = part["same"] & (part["distance"] >= 0) & (part["distance"] < (1 if layer == 2 else np.inf))
    scores = np.where(seen[:, None], np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)), 0)
    return scores / scores.sum(-1, keepdims=True)


def reach(part, layer, of_pair):
    """Returns the mean over the queries that count of what pairs of a query and a key give, by heads."""
    of_query = np.einsum("bhqk,bqk->bhq", attention(part, layer), of_pair)
    return np.einsum("bhq,bq->h", of_query, part["weights"]) / part["weights"].sum()


def test_the_reach_of_a_head_is_its_attention_to_far_keys_that_begin_no_document(corpus, scored, activations):
    share = [part["distance"] >= 3 for part in activations]
    no_sinks = [(part["positions"] >= 1)[:, None] for part in activations]
    pairs = [a * b for a, b in zip(share, no_sinks, strict=True)]
    want = [np.mean([reach(p, n, pair) for p, pair in zip(activations, pairs, strict=True)], axis=0) for n in range(3)]
    got = scored.scores("attention_distance")
    assert got.of_heads and got.unit == "of the attention"
    np.testing.assert_allclose(got.costs, want, atol=1e-5)
    assert (got.costs[2] == 0).all() and got.costs[0].min() > 0.01, "a token that attends to itself alone attends to nothing far"
    tokens = AttentionDistance(**OPTIONS, measure="distance", sinks=0).score(scored.model, corpus)
    distances = [np.mean([reach(part, layer, part["distance"]) for part in activations]) for layer in range(3)]
    np.testing.assert_allclose(tokens.per_layer(), distances, atol=1e-4)
    assert tokens.unit == "tokens" and tokens.errors.shape == (3,)


RIDGE = 1e-3  # small beside the few features of the test


def ridge_error(part, layer, half_life=16, ridge=RIDGE):
    """Returns the sums of squares of what ridge regression leaves and of the outputs, from residuals; by the module's formula."""
    fitted = []
    for p in part:
        q, k, v, y = p["layers"][layer]
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        weights = np.where((p["same"] & (p["distance"] >= 0))[:, None], 1 + np.einsum("bqhd,bkhd->bhqk", q, k), 0)
        features = []
        for decay in (1.0, 0.5 ** (1 / half_life)):
            of_pair = weights * decay ** np.maximum(p["distance"], 0)[:, None]
            f = np.einsum("bhqk,bkhd->bqhd", of_pair / of_pair.sum(-1, keepdims=True), v)
            features.append(f.reshape(*y.shape[:2], -1))
        x = np.concatenate([*features, np.ones((*y.shape[:2], 1))], axis=-1)
        folds = [(x[fold::2][p["weights"][fold::2] > 0], y[fold::2][p["weights"][fold::2] > 0]) for fold in range(2)]
        fitted.append(folds)
    errors = []
    for fold in range(2):
        x, y = (np.concatenate([folds[fold][n] for folds in fitted]) for n in range(2))
        strength = ridge * len(x) * x[:, :-1].var(0).mean() * np.append(np.ones(x.shape[1] - 1), 0)
        fit = np.linalg.solve(x.T @ x + np.diag(strength), x.T @ y)
        for folds in fitted:
            x, y = folds[1 - fold]
            errors.append(((y - x @ fit) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())
    return np.mean(errors)


def test_a_linear_fit_is_the_held_out_error_of_ridge_regression_and_a_mean_over_keys_is_linear(corpus, scored, activations):
    got = LinearFit(rows=4, seq_len=68, ridge=RIDGE).score(scored.model, corpus).per_layer()
    np.testing.assert_allclose(got, [ridge_error(activations, layer) for layer in range(3)], rtol=5e-3)
    assert got[1] < got[0] / 2, "equal attention to all keys is a linear recurrence without decay"


def test_a_layer_whose_output_is_constant_is_fitted_without_an_error(corpus, scored):
    model = three_layers(corpus.tokenizer.get_vocab_size())
    output = model.layers[2].self_attn.o_proj.kernel
    output.set_value(jnp.zeros_like(output[...]))
    costs = LinearFit(rows=4, seq_len=68).score(model, corpus).per_layer()
    assert costs[2] == 0 and costs[:2] == pytest.approx(scored.scores("linear_fit").per_layer()[:2])


def test_gradient_times_error_is_the_rise_of_the_loss_where_the_error_is_small(corpus):
    model = three_layers(corpus.tokenizer.get_vocab_size())
    for layer in model.layers:
        output = layer.self_attn.o_proj.kernel
        output.set_value(1e-3 * output[...])
    rises = SwaRetrieval(**OPTIONS).score(model, corpus).per_layer()
    estimates = GradientError(**OPTIONS).score(model, corpus).per_layer()
    assert min(map(abs, rises[:2])) > 3e-5, "each layer must matter for the test to tell"
    assert rises[2] == 0, "layer 2 keeps its own window, which is shorter"
    np.testing.assert_allclose(estimates, rises, rtol=0.1, atol=1e-5)


def test_a_head_costs_what_the_answers_loss_rises_without_it(corpus, scored):
    got, scorer = scored.scores("head_ablation"), HeadAblation(rows=4, seq_len=68)
    assert got.of_heads and got.costs.shape == got.errors.shape == (3, 4)
    assert got.costs[0, 3] == pytest.approx(0, abs=1e-6), "a head whose output is not read costs nothing"
    rows = answer_rows(scorer.synthetic(corpus), scorer.rows)

    def loss(*heads):
        model = three_layers(corpus.tokenizer.get_vocab_size())
        for layer, head in heads:
            kernel = model.layers[layer].self_attn.o_proj.kernel
            kernel.set_value(kernel[...].at[8 * head : 8 * head + 8].set(0))
        return loss_and_accuracy(model, rows)[0]

    for head in ((0, 1), (2, 2)):
        assert got.costs[head] == pytest.approx(loss(head) - loss(), abs=2e-5) and abs(got.costs[head]) > 1e-4


def test_layers_at_even_distances_alternate_and_attention_is_last():
    def converted(layers, count):
        costs = Uniform().score(tiny_model("-".join("*" * layers)), None).costs
        return sorted(np.argsort(costs)[:count].tolist())

    assert converted(8, 4) == [0, 2, 4, 6] and converted(8, 2) == [0, 4] and converted(8, 6) == [0, 1, 2, 4, 5, 6]
    for count in range(3, 12):
        gaps = np.diff(converted(12, count))
        assert gaps.max() <= 2 * gaps.min()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentionDistance(window=0), "select.window must be an integer at least 1"),
        (lambda: AttentionDistance(measure="far"), "select.measure must be one of 'share', 'distance'"),
        (lambda: AttentionDistance(sinks=-1), "select.sinks"),
        (lambda: AttentionDistance(per_head=1), "select.per_head must be true or false"),
        (lambda: GradientError(window=0), "select.window"),
        (lambda: GradientError(seq_len=65), "select.seq_len must be an integer at least 66"),
        (lambda: LinearFit(rows=1), "select.rows must be an integer at least 2"),
        (lambda: LinearFit(ridge=0), "select.ridge must be a number above 0"),
        (lambda: LinearFit(half_life=0), "select.half_life"),
        (lambda: LinearFit().check(tiny_config("*", max_position_embeddings=100)), "select.seq_len 256 is more than"),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scoring_leaves_the_model_as_it_is_and_all_scorers_are_drawn(scored, tmp_path):
    names = [name for name in SCORERS if name != "score_file"]
    compared = [Compared(name, scored.scores(name), 1.0, 1.0, "GKA-*-*") for name in names]
    after = split_model(scored.model)[1]
    assert scored.before.keys() == after.keys()
    assert all(np.array_equal(scored.before[name], after[name]) for name in after)
    config = tiny_config("*-*-*", vocab_size=scored.model.config.vocab_size, attention_windows=(None, None, 1))
    assert scored.model.config == config and scored.model.remat == "none"
    text = write_comparison(compared, tmp_path).read_text()
    assert all(name in text for name in names) and (tmp_path / "scores.png").exists()
