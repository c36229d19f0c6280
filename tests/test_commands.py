"""The command line: what it does, and one clear message for each kind of bad input, leaving nothing behind."""

import json
import os
import shutil

import numpy as np
import pytest

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import COMMANDS, main
from tests.conftest import GOLDEN, tiny_model


@pytest.fixture
def source(tmp_path):
    save_model(tiny_model("*-*"), tmp_path / "source", max_shard_bytes=6000)
    return tmp_path / "source"


def fails(capsys, *arguments):
    """Runs a command that must fail; returns its one message."""
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("hybrid-jax ") and "Traceback" not in error and len(error.splitlines()) == 1
    return error


def only_source(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_convert_makes_a_hybrid_that_loads(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), "--pattern", "*-GDN"]) == 0
    assert load_model(tmp_path / "out").config.pattern == "*-GDN"
    assert "*-GDN" in capsys.readouterr().out


def test_export_unfuses_and_casts(source, tmp_path):
    assert main(["convert", str(source), str(tmp_path / "fused"), "--pattern", "*DA-GKA*"]) == 0
    assert main(["export", str(tmp_path / "fused"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    model = load_model(tmp_path / "out")
    assert model.config.pattern == "*-GKA" and str(model.norm.weight[...].dtype) == "bfloat16"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    assert e.value.code == 0 and "usage" in capsys.readouterr().out


def test_a_missing_shard_is_named(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GKA")
    assert only_source(tmp_path)


def test_a_truncated_shard_is_named(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    error = fails(capsys, "convert", source, tmp_path / "out")
    assert shard.name in error and "truncated" in error
    assert only_source(tmp_path)


def test_an_unknown_family_is_named_beside_the_known_ones(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    error = fails(capsys, "convert", source, tmp_path / "out")
    assert "'gpt2'" in error and "qwen3" in error
    assert only_source(tmp_path)


def test_a_pattern_of_the_wrong_length_or_symbol_is_refused(source, tmp_path, capsys):
    assert "3 symbols" in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GKA-*")
    assert "layer 1: 'GKX'" in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GKX")
    assert "not built yet" in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-M3")
    assert only_source(tmp_path)


def test_an_output_that_can_not_be_written_is_refused_before_loading(source, tmp_path, capsys):
    shutil.rmtree(source / "nothing", ignore_errors=True)
    (tmp_path / "file").write_text("x")
    assert "is a file" in fails(capsys, "convert", source, tmp_path / "file" / "out")
    assert "exists already" in fails(capsys, "convert", tmp_path / "unread", source)
    (tmp_path / "file").unlink()
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "not writable" in fails(capsys, "convert", source, tmp_path / "closed" / "out")
        (tmp_path / "closed").rmdir()
    else:
        assert "not writable" in fails(capsys, "convert", source, "/proc/out")
    assert only_source(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path, capsys):
    assert "no model directory" in fails(capsys, "convert", tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(capsys, "convert", tmp_path / "empty", tmp_path / "out")
    shutil.copy(GOLDEN / "hmf" / "qwen3_gka" / "config.json", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    error = fails(capsys, "convert", tmp_path / "empty", tmp_path / "out")
    assert ".bin" in error and "safetensors" in error


def test_contradictions_in_a_hybrid_config_are_refused(tmp_path, capsys):
    shutil.copytree(GOLDEN / "hmf" / "qwen3_gka", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_types": ["*", "GDN"]}))
    assert "contradict" in fails(capsys, "convert", tmp_path / "source", tmp_path / "out")
    path.write_text(json.dumps({**config, "hybrid_override_pattern": "*-M2", "layer_types": ["*", "M2"]}))
    error = fails(capsys, "convert", tmp_path / "source", tmp_path / "out")
    assert "missing" in error and "unexpected" in error and "gka" in error
    path.write_text(json.dumps({**config, "vocab_size": 300}))
    assert "(300, 64)" in fails(capsys, "convert", tmp_path / "source", tmp_path / "out")


def test_priming_a_damaged_source_is_refused_before_anything_is_written(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    run = ["prime", "--config=configs/prime_tiny.py:GKA", "--workdir", tmp_path / "run", f"--config.source={source}"]
    assert "truncated" in fails(capsys, *run)
    shard.unlink()
    assert "missing" in fails(capsys, *run)
    assert only_source(tmp_path)


def test_bad_experiment_arguments_are_refused(tmp_path, capsys):
    assert "nothing.py" in fails(capsys, "prime", "--config=nothing.py", "--workdir", tmp_path / "run")
    bad = "--config.phases.align.stepz=3"
    assert "stepz" in fails(capsys, "prime", "--config=configs/prime_tiny.py:GKA", "--workdir", tmp_path / "run", bad)
    assert "prime_tiny knows" in fails(capsys, "prime", "--config=configs/prime_tiny.py:XYZ", "--workdir", tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--colour"])


def test_evaluate_wants_something_to_measure(tmp_path, capsys):
    assert "at least one" in fails(capsys, "evaluate")
    assert "NAME=DIR" in fails(capsys, "evaluate", "--model", "dir")
    assert "not a run" in fails(capsys, "evaluate", "--run", f"a={tmp_path}")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import hybrid_jax.convert.save as save

    def broken(*a, **k):
        raise OSError("No space left on device")

    monkeypatch.setattr(save, "save_file", broken)
    with pytest.raises(OSError):
        save_model(tiny_model("*"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_evaluation_results_are_reused_and_drawn(tmp_path, capsys):
    arguments = [
        "evaluate",
        "--model",
        "source=launch/tiny_qwen3",
        "--rows",
        "4",
        "--out",
        str(tmp_path / "r"),
        "--prompt",
        "def f(",
    ]
    assert main(arguments) == 0
    first = (tmp_path / "r" / "results.json").read_text()
    report = (tmp_path / "r" / "report.md").read_text()
    assert "| source |" in report and "def f(" in report
    assert (tmp_path / "r" / "recovery.png").stat().st_size > 5000
    marked = json.loads(first)
    marked[0]["row"]["text_loss"] = 1.25
    (tmp_path / "r" / "results.json").write_text(json.dumps(marked))
    assert main(arguments) == 0
    assert np.isclose(json.loads((tmp_path / "r" / "results.json").read_text())[0]["row"]["text_loss"], 1.25)
