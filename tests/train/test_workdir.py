"""A run's model at any point of it, in whatever form the next one wants."""

import errno
import json
import pathlib
import shutil
import tempfile

import jax
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_jax import load_model
from hybrid_jax.commands.main import main
from hybrid_jax.experiment import run_experiment
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.priming.fuse import unfuse
from hybrid_jax.train import read_metrics
from hybrid_jax.train.evaluation import Evaluation
from hybrid_jax.workdir import load_run
from tests.train.conftest import arrays, experiment


@pytest.fixture(scope="module")
def run(made_source, tmp_path_factory):
    """A run of two phases, the first of which kept its checkpoints and rounded what is frozen; layers are stacked in training."""
    source, text = made_source
    config = experiment(source, pattern="GKA-GKA")
    config.data.text = text
    config.phases.align.update(dict(steps=5, checkpoint_every=2, keep_every=2, keep=1, frozen_dtype="bfloat16"))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    run_experiment(config, workdir)
    return workdir


def test_the_outcome_and_the_end_of_a_phase(run):
    assert all(np.array_equal(v, arrays(load_model(run / "model"))[n]) for n, v in arrays(load_run(run)).items())
    stage = arrays(load_model(run / "stages" / "01_align"))
    for model in (load_run(run, "align"), load_run(run, "align", 5)):
        assert model.config.pattern == "GKA*-GKA*"
        assert all(np.array_equal(v, stage[n]) for n, v in arrays(model).items())


@pytest.mark.parametrize("mesh", [None, make_mesh({"fsdp": 1}, jax.devices()[:1])])
def test_a_checkpoint_within_a_phase_in_the_teacher_s_the_fused_and_the_hybrid_s_form(run, mesh):
    initial, end = (arrays(load_model(run / "stages" / s)) for s in ("00_initial", "01_align"))
    fused = load_run(run, "align", 2, mesh=mesh)
    found = arrays(fused)
    for name in found:
        if ".gka." in name:
            assert not np.array_equal(found[name], end[name]) or name.endswith("A_log"), name
            assert not np.array_equal(found[name], initial[name]), name
        else:
            assert np.array_equal(found[name], end[name]), name
            before = initial.get(name, found[name])
            rounded = before.astype(ml_dtypes.bfloat16) if before.ndim > 1 else before
            assert np.array_equal(found[name], rounded), name
    hybrid = unfuse(fused)
    assert hybrid.config.pattern == "GKA-GKA" and all(np.array_equal(v, found[n]) for n, v in arrays(hybrid).items())


def test_a_phase_under_way_is_had_at_its_newest_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for gone in ("model", "stages/01_align", "stages/02_train", "checkpoints/align/5"):
        shutil.rmtree(tmp_path / "run" / gone)
    newest, step4 = arrays(load_run(tmp_path / "run", "align")), arrays(load_run(run, "align", 4))
    assert all(np.array_equal(step4[n], v) for n, v in newest.items())
    with pytest.raises(FileNotFoundError, match="has not finished; run its command again to resume it, or name a phase: align"):
        load_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="has not come to phase 'train'"):
        load_run(tmp_path / "run", "train")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--phase", "align"]) == 0
    exported = load_model(tmp_path / "out")
    assert exported.config.pattern == "GKA-GKA" and (tmp_path / "out" / "tokenizer.json").exists()
    assert all(np.array_equal(newest[n], v) for n, v in arrays(exported).items())


def test_the_best_checkpoint_of_a_run_is_exported_by_the_step_that_its_metrics_name(made_source, tmp_path, monkeypatch):
    """Step 2 of 5 is the best, neither the newest nor one that `checkpoint_every` saves."""
    seen = {}

    def evaluate(self, view):
        seen[view.step] = {n: np.asarray(x) for n, x in view.layout.parameters(view.state, view.frozen).items()}
        return {"eval/loss": [3.0, 1.0, 2.0, 2.5, 1.5][view.step - 1]}

    monkeypatch.setattr(Evaluation, "__call__", evaluate)
    source, text = made_source
    config = experiment(source, schedule=("train",))
    config.data.text = text
    config.phases.train.update(dict(steps=5, checkpoint_every=100, keep=1, eval_every=1, keep_best=True, eval_rows=1))
    run_experiment(config, tmp_path / "run")
    step = int([r["eval/best_step"] for r in read_metrics(tmp_path / "run") if "eval/best_step" in r][-1])
    assert step == 2
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--phase", "train", "--step", str(step)]) == 0
    best, last = arrays(load_model(tmp_path / "out")), arrays(load_model(tmp_path / "run" / "model"))
    assert {*best} == {*seen[2]} and all(np.array_equal(x, seen[2][n]) for n, x in best.items())
    assert any(not np.array_equal(x, last[n]) for n, x in best.items())


def test_what_is_not_there_is_named(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no phase 'algin'; it has align, train"):
        load_run(run, "algin")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 in .*; there: steps 2, 4, 5"):
        load_run(run, "align", 3)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 1 in .*; there: none"):
        load_run(run, "train", 1)
    with pytest.raises(FileNotFoundError, match="no run's working directory"):
        load_run(tmp_path)
    for arguments, words in (
        ((run, "--step", "2"), "--step needs the --phase"),
        ((run / "model", "--phase", "align"), "is no run's working directory"),
    ):
        assert main(["export", *map(str, arguments[:1]), str(tmp_path / "out"), *arguments[1:]]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_said_to_be_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "align" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="the checkpoint of step 2 in .* cannot be read"):
        load_run(tmp_path / "run", "align", 2)


@pytest.mark.parametrize("closed", ["", "stages", "checkpoints/align"])
def test_a_run_that_can_not_be_written_any_more_is_refused_before_it_goes_on(run, tmp_path, monkeypatch, closed):
    shutil.copytree(run, tmp_path / "run")
    for gone in ("model", "stages/02_train"):
        shutil.rmtree(tmp_path / "run" / gone)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    temporary_file = tempfile.TemporaryFile

    def read_only(*args, dir=None, **options):
        if pathlib.Path(dir) == tmp_path / "run" / closed:
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary_file(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    config = ConfigDict(json.loads((tmp_path / "run" / "config.json").read_text()))
    with pytest.raises(PermissionError, match="is not writable .Read-only file system"):
        run_experiment(config, tmp_path / "run")
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
