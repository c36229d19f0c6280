"""Patterns from scores: a share of the layers, a share of the heads, bytes at a length; what does not go together is refused."""

import dataclasses
import json

import numpy as np
import pytest

from hybrid_jax.config import parse_pattern
from hybrid_jax.memory import state_bytes
from hybrid_jax.selection.budgets import converted, pattern_of_bytes, pattern_of_heads
from hybrid_jax.selection.scorers import SCORERS
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.select import Selection, choose_pattern, uncertain_choice
from tests.conftest import tiny_config, tiny_model

HEADS = np.array([[9.0, 0.1, 0.2, 8.0], [0.3, 0.4, 0.5, 0.6], [7.0, 6.0, 5.0, 4.0]])


def test_the_most_costly_heads_of_all_layers_stay_attention():
    pattern = pattern_of_heads(HEADS, "GDN", 0.5)
    assert pattern == "GDN[0,3]-GDN-*", "a layer without kept heads is the mixer, one that keeps all is attention"
    assert [spec.attention_heads for spec in parse_pattern(pattern)] == [(0, 3), (), ()]
    assert pattern_of_heads(HEADS, "GDN", 1 / 12) == "GDN[0,2,3]-*-*"
    assert pattern_of_heads(HEADS, "M2", 1.0) == "M2-M2-M2"
    assert pattern_of_heads(np.zeros((2, 4)), "GKA", 0.25) == "GKA[2,3]-*", "at equal costs the earlier heads are converted"
    with pytest.raises(ValueError, match="select.fraction 0.01 of 12 heads is none"):
        pattern_of_heads(HEADS, "GDN", 0.01)
    with pytest.raises(ValueError, match="score of layer 1, head 2, is nan"):
        pattern_of_heads(np.where(HEADS == 0.5, np.nan, HEADS), "GDN", 0.5)


def test_what_a_pattern_converts_is_read_back_from_it():
    assert converted("GDN[0,3]-GDN-*", (3, 4)).tolist() == [[False, True, True, False], [True] * 4, [False] * 4]
    assert converted("*-GKA-*", (3,)).tolist() == [False, True, False]


def test_as_few_layers_are_converted_as_fit_in_the_bytes_and_the_cheapest_first():
    config, costs = tiny_config("*-*-*-*", attention_windows=(None, 2, None, None)), [0.3, 0.0, 0.1, 0.2]
    source, two = (state_bytes(config.with_pattern(p), 200) for p in ("*-*-*-*", "*-*-SWA-SWA"))
    assert pattern_of_bytes(costs, "SWA", config, two, 200) == "*-*-SWA-SWA", "layer 1 holds less than the mixer would"
    assert pattern_of_bytes(costs, "SWA", config, source - 1, 200) == "*-*-SWA-*"
    assert pattern_of_bytes(costs, "SWA", config, two - 1, 200) == "SWA-*-SWA-SWA"
    with pytest.raises(ValueError, match=f"the source holds {source:,} bytes at 200 tokens, so nothing would be converted"):
        pattern_of_bytes(costs, "SWA", config, source, 200)
    least = state_bytes(config.with_pattern("SWA-*-SWA-SWA"), 200)
    with pytest.raises(ValueError, match=f"the model holds {least:,} bytes"):
        pattern_of_bytes(costs, "SWA", config, least - 1, 200)


@dataclasses.dataclass(frozen=True)
class ByHeads:
    """A toy whose scores are `HEADS`."""

    of_heads = True

    def check(self, config, mesh): ...

    def score(self, model, corpus, mesh):
        return Scores(HEADS, "nats", np.full(HEADS.shape, 0.06))


def test_a_scorer_of_heads_chooses_heads_and_its_scores_are_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SCORERS, "toy", f"{__name__}:ByHeads")
    how = {"mixer": "GDN", "fraction": 0.25, "scorer": "toy", "budget": "heads"}
    selection = Selection.from_config(how)
    assert choose_pattern(tiny_model("*-*-*"), "", selection, None, tmp_path) == "GDN[0,3]-GDN[1,2,3]-*"
    record = json.loads((tmp_path / "selection.json").read_text())
    assert record["scores"] == HEADS.tolist() and record["budget"] == "heads"
    out = capsys.readouterr().out
    assert "converting the heads of layer 0 costs +9.0000 +0.1000 +0.2000 +8.0000 nats" in out
    assert "do not tell which of 1 converted and 1 kept heads to convert" in out
    assert selection.example(tiny_config("*-*-*")) == "GDN[3]-*-*"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scorer="head_ablation"), "'head_ablation' scores heads, select.budget 'layers' needs scores of layers"),
        (dict(budget="heads"), "'swa_retrieval' scores layers, select.budget 'heads' needs scores of heads"),
        (dict(scorer="head_ablation", budget="heads", mixer="SWA"), "select.mixer must be recurrent"),
        (dict(mixer="GKA-GDN"), "select.mixer must be the symbol of one mixer"),
        (dict(mixer="GDN[3]"), "select.mixer must be the symbol of one mixer"),
        (dict(budget="bytes", tokens=5), "select.state_bytes must be set with select.budget 'bytes'"),
        (dict(budget="bytes", state_bytes=5), "select.tokens must be set"),
        (dict(tokens=5), "select.tokens must be set with select.budget 'bytes', and not with others"),
        (dict(budget="parameters"), "select.budget must be one of"),
    ],
)
def test_a_budget_that_does_not_fit_its_scorer_or_mixer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Selection(**changes)


def test_a_budget_is_checked_before_anything_is_measured():
    few = Selection(budget="bytes", state_bytes=1, tokens=100)
    with pytest.raises(ValueError, match="select.state_bytes 1: with GKA in every layer"):
        few.check(tiny_config("*-*", max_position_embeddings=512))
    with pytest.raises(ValueError, match="layer 1 is 'GKA', only a model whose layers are attention is scored"):
        Selection().check(tiny_config("*-GKA"))
    per_head = Selection(scorer="attention_distance", options={"per_head": True}, budget="heads")
    assert per_head.make_scorer().of_heads


def test_a_choice_of_bytes_within_the_noise_names_its_layers():
    scores = Scores([0.3, 0.0, 0.1, 0.11], "nats", np.full(4, 0.01))
    assert "whether to convert layer 2 or layer 3:" in uncertain_choice(scores, "*-SWA-SWA-*")
