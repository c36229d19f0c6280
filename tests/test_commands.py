"""The command line: what it does, and one clear message for each kind of bad input, leaving nothing behind."""

import argparse
import json
import os
import shutil

import numpy as np
import pytest

from hybrid_jax import load_model, save_model
from hybrid_jax.commands import evaluate
from hybrid_jax.commands.main import COMMANDS, Command, main
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
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


TOY = """
def add_arguments(parser):
    parser.add_argument("name", help="whom to greet")


def run(args):
    if args.name == "nobody":
        raise ValueError("there is nobody to greet")
    print(f"hello {args.name} {args.overrides}")
"""


def test_a_row_of_the_table_is_all_that_a_command_needs(tmp_path, capsys, monkeypatch):
    (tmp_path / "toy_commands").mkdir()
    (tmp_path / "toy_commands" / "greet.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    row = Command("toy_commands.greet", "greet somebody", "world", overrides=True, resumable=True)
    monkeypatch.setitem(COMMANDS, "greet", row)
    assert main(["greet", "world", "--config.a=1"]) == 0 and capsys.readouterr().out == "hello world ['--config.a=1']\n"
    assert fails(capsys, "greet", "nobody") == "hybrid-jax greet: there is nobody to greet"
    with pytest.raises(SystemExit) as e:
        main(["greet", "world", "--loud"])
    assert e.value.code == 2 and "unknown option --loud" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main(["greet", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "hybrid-jax greet world" in words and "whom to greet" in words
    assert "and greet continue when the same command is given again" in words


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
    twice = ("--model", f"a={tmp_path}", "--run", f"a={tmp_path}")
    assert "the name 'a' is given twice" in fails(capsys, "evaluate", *twice)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import hybrid_jax.convert.save as save

    def broken(*a, **k):
        raise OSError("No space left on device")

    monkeypatch.setattr(save, "save_file", broken)
    with pytest.raises(OSError):
        save_model(tiny_model("*"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """Two small models of one text, each with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("evaluation")
    lines = [f"line {i} of {i * i} words: {'abc def ghi jkl'[i % 9 :]}" for i in range(1500)]
    (root / "text.txt").write_text("\n".join(lines))
    for name, size in (("small", 280), ("large", 400)):
        save_model(tiny_model("*", vocab_size=size), root / name)
        save_tokenizer(train_tokenizer(lines, size), root / name, 256)
    return root


def evaluated(root, out, *models, capsys):
    """{name: its loss} by `evaluate --out`, and what it printed."""
    flags = [f"--model={m}={root / m}" for m in models]
    assert main(["evaluate", *flags, "--text", str(root / "text.txt"), "--rows=4", "--seq-len=80", "--out", str(out)]) == 0
    rows = [r["row"] for r in json.loads((out / "results.json").read_text())]
    return {r["name"]: r["text_loss"] for r in rows}, "".join(capsys.readouterr())


def test_evaluate_refuses_before_any_work_what_does_not_fit_the_model(two_tokenizers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hybrid_jax.convert.load_model", None)
    command = ("evaluate", f"--model=a={two_tokenizers / 'small'}", "--text", two_tokenizers / "text.txt")
    assert "--seq-len must be at least 66, the tokens of a retrieval of 16 pairs, got 65" in fails(capsys, *command, "--seq-len=65")
    words = "--seq-len 257 is more than the max_position_embeddings of 'a'"
    assert words in fails(capsys, *command, "--seq-len=257")
    assert "256 positions" in fails(capsys, *command, "--prompt", "12 " * 200)
    assert "at least one token" in fails(capsys, *command, "--prompt", "")


def test_a_stored_result_is_of_its_options(two_tokenizers):
    def of(**changes):
        options = dict(text=str(two_tokenizers / "text.txt"), seq_len=80, rows=4)
        return evaluate._fingerprint(two_tokenizers / "small", argparse.Namespace(**{**options, **changes}))

    others = [of(), of(seq_len=81), of(rows=5), of(text="stdlib")]
    assert of() == others[0] and all(a != b for n, a in enumerate(others) for b in others[:n])


def test_a_run_may_be_measured_at_the_length_of_its_last_stage(two_tokenizers, tmp_path, monkeypatch):
    for number, (stage, positions) in enumerate((("initial", 256), ("longer", 512))):
        directory = shutil.copytree(two_tokenizers / "small", tmp_path / "run" / "stages" / f"0{number}_{stage}")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"source": "somewhere"}))
    args = argparse.Namespace(model=[], run=[f"r={tmp_path / 'run'}"], seq_len=512, prompt=None)
    todo = evaluate._to_measure(args)
    assert [(m.name, m.stage, m.source) for m in todo] == [("r initial", 0, "somewhere"), ("r longer", 1, "somewhere")]
    evaluate._check(args, todo)
    args.seq_len = 513
    with pytest.raises(ValueError, match="of 'r longer'"):
        evaluate._check(args, todo)


def test_an_evaluation_that_is_stopped_keeps_the_results_of_the_models_after_it(two_tokenizers, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    evaluated(two_tokenizers, out, "small", "large", capsys=capsys)
    stored = json.loads((out / "results.json").read_text())
    monkeypatch.setattr("hybrid_jax.progress.progress_bar", lambda items, **_: items[:1])  # stopped after the first
    evaluated(two_tokenizers, out, "small", "large", capsys=capsys)
    assert json.loads((out / "results.json").read_text()) == stored


def test_every_model_is_evaluated_with_its_own_tokenizer(two_tokenizers, tmp_path, capsys):
    alone = {m: evaluated(two_tokenizers, tmp_path / m, m, capsys=capsys)[0][m] for m in ("small", "large")}
    for order in (("small", "large"), ("large", "small")):
        losses, printed = evaluated(two_tokenizers, tmp_path / "-".join(order), *order, capsys=capsys)
        assert losses == alone
        assert "2 different tokenizers" in printed
    assert "tokenizer" not in evaluated(two_tokenizers, tmp_path / "again", "small", capsys=capsys)[1]


@pytest.mark.parametrize("changed", ["text.txt", "config.json", "tokenizer.json"])
def test_a_stored_result_is_used_only_while_nothing_it_depends_on_has_changed(two_tokenizers, tmp_path, capsys, changed):
    root = shutil.copytree(two_tokenizers, tmp_path / "root")
    out = tmp_path / "out"
    evaluated(root, out, "small", capsys=capsys)
    stored = json.loads((out / "results.json").read_text())
    stored[0]["row"]["text_loss"] = 1.25  # a value that no evaluation gives
    (out / "results.json").write_text(json.dumps(stored))
    assert evaluated(root, out, "small", capsys=capsys)[0]["small"] == 1.25
    path = root / changed if changed == "text.txt" else root / "small" / changed
    path.write_text(path.read_text() + "\n")
    losses, printed = evaluated(root, out, "small", capsys=capsys)
    assert losses["small"] != 1.25 and "measured again" in printed and changed.removesuffix(".txt") in printed


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
