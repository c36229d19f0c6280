"""Checkpoints: what is damaged is passed over, what was saved stays saved, whatever happens to the writer."""

import pathlib
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.parameters import split_model
from hybrid_jax.train import checkpoint
from hybrid_jax.train.checkpoint import Checkpoints
from hybrid_jax.train.phase_layout import PhaseLayout
from tests.train.conftest import arrays, losses, model_for, phase, saved_steps, train


def damage(directory: pathlib.Path, step: int):
    """Cuts every file of a checkpoint's arrays short."""
    for path in (directory / "checkpoints" / str(step) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_if_it_had_not_been(corpus, tmp_path, capsys):
    whole = arrays(train(corpus, tmp_path / "whole"))
    train(corpus, tmp_path / "parts")
    assert saved_steps(tmp_path / "parts") == [4, 6]
    damage(tmp_path / "parts", 6)
    capsys.readouterr()
    again = arrays(train(corpus, tmp_path / "parts"))
    told = capsys.readouterr().out
    assert "step 6" in told and "damaged and cannot be read, trying the one before" in told and "resumed at step 4" in told
    assert all(np.array_equal(whole[n], again[n]) for n in whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert saved_steps(tmp_path / "parts") == [4, 6]
    aside = tmp_path / "parts" / "checkpoints" / "damaged-6"
    assert str(aside) in told and list((aside / "state").rglob("manifest.ocdbt")), "renamed, not deleted"


def test_when_none_can_be_read_nothing_is_begun_again(corpus, tmp_path):
    train(corpus, tmp_path)
    for step in saved_steps(tmp_path):
        damage(tmp_path, step)
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* \(steps 6, 4\) can be read; repair or remove"):
        train(corpus, tmp_path)
    assert saved_steps(tmp_path) == [4, 6]


def test_an_unfinished_checkpoint_is_no_checkpoint(corpus, tmp_path, capsys):
    train(corpus, tmp_path)
    (tmp_path / "checkpoints" / "6").rename(tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp")
    capsys.readouterr()
    train(corpus, tmp_path)
    assert "resumed at step 4" in capsys.readouterr().out


def test_the_newest_stay_and_those_asked_for(corpus, tmp_path):
    train(corpus, tmp_path, checkpoint_every=1, keep=2, keep_every=3)
    assert saved_steps(tmp_path) == [3, 5, 6]


def test_a_full_disk_ends_the_run_and_loses_nothing_earlier(corpus, tmp_path):
    before = arrays(train(corpus, tmp_path, steps=2))
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises((OSError, ValueError)):
            train(corpus, tmp_path, steps=4, schedule="constant")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    after = arrays(train(corpus, tmp_path, steps=2))
    assert saved_steps(tmp_path)[0] == 2
    assert all(np.array_equal(before[n], after[n]) for n in before)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Two checkpoints, and the state to restore like; nothing waits before it reads again."""
    monkeypatch.setattr(checkpoint, "WAITS", (0.0, 0.0))
    parameters = {"w": jnp.arange(6.0).reshape(2, 3)}
    state = checkpoint.TrainState(parameters, {"m": jnp.ones(3)}, checkpoint.Health.new())
    writer = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 5):
        writer.save(step, state._replace(trainable={"w": step + parameters["w"]}), {"at": step})
    writer.close()
    return tmp_path, state


def values_of(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The file that holds a checkpoint's arrays."""
    return max((directory / "checkpoints" / str(step) / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)


def test_an_error_of_the_disk_that_stays_ends_the_run_and_changes_nothing(saved, capsys):
    directory, state = saved
    path = values_of(directory, 5)
    path.rename(path.with_name("kept"))
    path.symlink_to(path.name)  # to itself: the system cannot open it
    with pytest.raises(OSError, match="of step 5 in .* could not be read: .*symbolic links.*nothing was changed"):
        Checkpoints(directory / "checkpoints").restore_latest(state)
    assert capsys.readouterr().out.count("again in") == 2
    path.unlink()
    path.with_name("kept").rename(path)
    step, got, beside = Checkpoints(directory / "checkpoints").restore_latest(state)
    assert (step, beside) == (5, {"at": 5}) and got.trainable["w"][0, 0] == 5


def test_an_error_that_passes_is_waited_for(saved, monkeypatch, capsys):
    directory, state = saved
    real, errors = checkpoint.ocp.CheckpointManager.restore, [TimeoutError("timed out"), ValueError("UNAVAILABLE: try later")]

    def restore(self, step, **options):
        if errors:
            raise errors.pop(0)
        return real(self, step, **options)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", restore)
    step, got, _ = Checkpoints(directory / "checkpoints").restore_latest(state)
    assert step == 5 and got.trainable["w"][1, 2] == 10 and saved_steps(directory) == [3, 5]
    assert "timed out" in capsys.readouterr().out


def test_all_processes_go_on_from_the_newest_checkpoint_that_none_finds_damaged(saved, monkeypatch):
    """This process can read step 5; another one, which reads other parts of the files, only step 3."""
    directory, state = saved
    asked = []

    def both(own):
        asked.append(own)
        return [own, min(own, 3) if len(asked) > 1 else own]

    monkeypatch.setattr(checkpoint, "of_every_process", both, raising=False)
    step, got, beside = Checkpoints(directory / "checkpoints").restore_latest(state)
    assert (step, beside) == (3, {"at": 3}) and got.trainable["w"][0, 0] == 3 and asked == [5, 5, 3]
    assert saved_steps(directory) == [3] and (directory / "checkpoints" / "damaged-5").exists()
    monkeypatch.setattr(checkpoint, "of_every_process", lambda own: [own, 0])
    with pytest.raises(OSError, match="only some processes of the job see checkpoints"):
        Checkpoints(directory / "checkpoints").restore_latest(state)


@pytest.mark.parametrize("part", ["values", "metadata", "iterator", "item"])
def test_whatever_part_is_damaged_it_is_renamed_and_the_one_before_is_taken(saved, part):
    directory, state = saved
    five = directory / "checkpoints" / "5"
    if part == "values":
        path = values_of(directory, 5)
        path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    elif part == "item":
        (five / "data").rename(directory / "elsewhere")
    else:
        path = five / {"metadata": "state/_METADATA", "iterator": "data/metadata"}[part]
        path.write_bytes(path.read_bytes()[:-2])
    (directory / "checkpoints" / "damaged-5").mkdir()  # of an earlier time
    checkpoints = Checkpoints(directory / "checkpoints")
    step, got, beside = checkpoints.restore_latest(state)
    assert (step, beside) == (3, {"at": 3}) and got.trainable["w"][0, 0] == 3
    assert saved_steps(directory) == [3] and (directory / "checkpoints" / "damaged-5.1" / "state").is_dir()
    checkpoints.save(5, got, {"at": 5})
    checkpoints.close()
    assert saved_steps(directory) == [3, 5]


def test_a_checkpoint_of_other_parameters_is_not_called_damaged(saved):
    directory, state = saved
    for other in ({"v": jnp.zeros((2, 3))}, {"w": jnp.zeros((2, 4))}):
        with pytest.raises(ValueError, match="step 5 in .* could not be read: .*nothing was changed"):
            Checkpoints(directory / "checkpoints").restore_latest(state._replace(trainable=other))
    assert saved_steps(directory) == [3, 5]


def test_health_is_restored_with_the_rest(corpus, tmp_path):
    p, model = phase(), model_for(corpus)
    state, _, _ = PhaseLayout(model, p).begin(None, split_model(model)[1])
    state = state._replace(health=state.health._replace(skipped=state.health.skipped + 7))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, state, {"next": 1})
    checkpoints.close()
    step, got, data = Checkpoints(tmp_path / "c").restore_latest(state)
    assert (step, data, int(got.health.skipped)) == (3, {"next": 1}, 7)
    assert jax.tree.structure(got) == jax.tree.structure(state)
