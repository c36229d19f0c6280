"""The committed studies: every point is an experiment that can run, measured by an evaluation that fits it, with three seeds."""

import collections
import pathlib
import re

import pytest

from hybrid_jax.commands.sweep import check_points
from hybrid_jax.config_file import load_config
from hybrid_jax.evaluate.evaluation import read_evaluation
from hybrid_jax.fields import load_experiment_config
from hybrid_jax.sweep import points_of

EVERY = sorted(pathlib.Path("configs/studies").glob("*.py"))
MEASURED = [path for path in EVERY if path.stem == "dial"]  # one model, measured in several ways; the others are sweeps
STUDIES = [path for path in EVERY if path not in MEASURED]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_point_of_a_study_can_run_with_three_seeds(study):
    sweep = load_config([f"--config={study}"]).to_dict()
    points = points_of(sweep)
    assert len(check_points(points)) == len(points) >= 12
    seeds = collections.Counter(point.without("seed") for point in points)
    assert set(seeds.values()) == {3}
    evaluation = read_evaluation(sweep["evaluate"]["config"])
    assert "cost" in evaluation.instruments and len(evaluation.instruments) > 1


@pytest.mark.parametrize("study", EVERY, ids=lambda path: path.stem)
def test_a_study_says_that_it_has_not_been_run_or_has_a_page_of_its_outcome(study):
    text, page = study.read_text(), study.with_suffix(".md")
    assert ("It has not been run yet." in text) == (not page.exists()) and page.exists() == (f"outcome is in {page.name}" in text)
    if page.exists():
        for part in ("**Question.**", "**Cost.**", "**What it shows.**", "**What it does not show.**"):
            assert part in page.read_text(), part
        command = "evaluate" if study in MEASURED else "sweep"
        assert re.search(rf"`hybrid-jax {command} --config {study}(:[\w/]+)? --out ", page.read_text())
        pictures = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
        assert pictures and all((study.parent / picture).exists() for picture in pictures)


def test_there_are_studies_of_every_claim():
    claims = "composition dial half_state kept_heads layers methods mixers mqar starts state_tracking"
    assert [path.stem for path in EVERY] == claims.split()


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_an_unknown_point_is_refused_with_those_there_are(study):
    with pytest.raises(ValueError, match=f"{study.stem} knows .*M2.*got 'XYZ'"):
        load_config([f"--config={study}:XYZ"])


def test_the_study_of_iterations_measures_each_setting_of_one_hybrid_beside_the_source():
    config = load_experiment_config(["--config=configs/studies/mixers.py:GKA-50"])
    layers = [i for i, symbol in enumerate(config.pattern.split("-")) if symbol == "GKA"]
    evaluation = read_evaluation("configs/studies/dial.py:runs/mine/model")
    trained, source, *others = evaluation.models
    assert trained.name == f"{config.mixers.gka_config.num_iter} as trained" and trained.given is source.given is None
    assert {str(target.path) for target in (trained, *others)} == {"runs/mine/model"} and source.path.name == "tiny_qwen3"
    *uniform, one, other = (target.given for target in others)
    assert uniform == [1, 2, 4, 8, 20, 30] and sorted({**one, **other}) == layers
    assert {"text", "needles", "pairs", "cost", "speed"} == set(evaluation.instruments)
