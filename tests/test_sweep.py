"""Sweeps: every point once, results in one table, a failure told and survived, and the rest done when asked again."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_jax.commands.main import main
from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.measured import Measured, Target, write_measured
from hybrid_jax.evaluate.measurement import weighted_mean
from hybrid_jax.files import new_directory, write_text
from hybrid_jax.sweep import claim, collect, measure_models, points_of, run_point
from hybrid_jax.sweep.collecting import _grouped, draw_sweep
from hybrid_jax.sweep.running import _command

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    rows = dict(steps=2, batch_size=2, seq_len=32)
    align = dict(form="fused", objective="align_mixer", trainable=(r"[.]swa[.]",), learning_rate=1e-4, **rows)
    return ConfigDict(dict(
        source="SOURCE", pattern="*-SWA", schedule=("align",), phases=dict(align=align),
        data=dict(text="TEXT", mix=dict(text=1.0)), seed=0,
    ))
"""
SWEEP = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(configs=("BASE",), grid=dict(phases=dict(align=dict(learning_rate=(1e-3, 1e-2))), seed=(0,))))
"""


def test_points_are_every_combination():
    config = ConfigDict({"configs": ("a.py:X", "b.py"), "grid": {"p": {"q": (1, 2)}, "r": ("s",)}, "points": ({"t": 0}, {"t": 1})})
    points = points_of(config)
    assert len(points) == 8 == len({p.name for p in points})
    assert (points[0].config, points[0].overrides) == ("a.py:X", (("p.q", 1), ("r", "s"), ("t", 0)))
    assert points[0].arguments == ["--config=a.py:X", "--config.p.q=1", "--config.r=s", "--config.t=0"]
    for bad, words in (
        ({"configs": ()}, "no configs"),
        ({"configs": ("a", "a")}, "same point twice"),
        ({"configs": "a.py"}, "sweep.configs must be a tuple of files, got 'a.py'"),
        ({"configs": ("a",), "grid": {"p": {"steps": 3}}}, r"sweep.grid.p.steps must be a tuple of values, got 3"),
        ({"configs": ("a",), "evaluate": {"row": 3}}, r"sweep.evaluate has the unknown key 'row'"),
        ({"config": 1}, "unknown key 'config'"),
    ):
        with pytest.raises(ValueError, match=words):
            points_of(ConfigDict(bad))


def test_a_point_is_named_by_what_varies_and_no_two_names_are_equal():
    constant = {"source": "/a/long/path", "train": {"steps": 20}}
    config = {"configs": ("c/x.py:GDN",), "grid": {"align": {"lr": (1, 2)}, "train": {"lr": (3,)}}, "points": (constant,)}
    assert [p.name for p in points_of(ConfigDict(config))] == ["lr=1", "lr=2"]
    both = config | {"grid": {"align": {"lr": (1,)}}, "points": ({"train": {"lr": 1}}, {"train": {"lr": 2}}, {"align": {"lr": 2}})}
    assert [p.name for p in points_of(ConfigDict(both))] == ["align_lr=1_train_lr=1", "align_lr=1_train_lr=2", "align_lr=2"]
    long = config | {"grid": {"pattern": ("*-GKA" * 60 + "-GDN", "*-GKA" * 60 + "-GKA")}}
    names = [p.name for p in points_of(ConfigDict(long))]
    assert len(set(names)) == 2 and max(map(len, names)) <= 100
    colliding = config | {"grid": {"pattern": ("*-GKA", "*_GKA")}}  # one character is replaced by the other in a file's name
    assert len({p.name for p in points_of(ConfigDict(colliding))}) == 2


@pytest.mark.parametrize("whom", ["the sweep", "its process group"])
def test_a_sweep_asked_to_stop_waits_until_its_point_has_saved(tmp_path, whom):
    child = tmp_path / "child"
    child.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "asked = []\nsignal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        "print('running', file=sys.stderr, flush=True)\n"
        "while not asked:\n    print('a step', file=sys.stderr, flush=True)\n    time.sleep(0.02)\n"
        "for _ in range(10):\n    print('saving', file=sys.stderr, flush=True)\n    time.sleep(0.02)\n"
        f"pathlib.Path({str(tmp_path / 'saved')!r}).touch()\nsys.exit(3)\n"
    )
    child.chmod(0o755)
    sweep = (
        f"import sys; from hybrid_jax.sweep.running import _command; sys.executable = {str(child)!r}; print(_command('prime')[0])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", sweep], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr.readline() == "running\n"
    (os.kill if whom == "the sweep" else os.killpg)(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert out == "stopped\n" and process.returncode == 0 and (tmp_path / "saved").exists(), errors[-2000:]
    assert "waiting until the running point has saved" in errors


@pytest.fixture
def sweep(made_source, tmp_path):
    source, text = made_source
    (tmp_path / "base.py").write_text(CONFIG.replace("SOURCE", str(source)).replace("TEXT", text))
    (tmp_path / "sweep.py").write_text(SWEEP.replace("BASE", str(tmp_path / "base.py")))
    return ["sweep", f"--config={tmp_path / 'sweep.py'}", f"--out={tmp_path / 'out'}"]


def test_points_run_one_by_one_as_an_array_and_are_collected(sweep, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main([*sweep, "--list"]) == 0
    assert "0 learning_rate=0.001: " in capsys.readouterr().out
    assert main([*sweep, "--index", "0"]) == 0
    statuses = {r["name"]: r["status"] for r in json.loads((out / "results.json").read_text())}
    assert list(statuses.values()) == ["done", "not run"]
    done = {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert main([*sweep, "--index", "array"]) == 0
    assert main([*sweep, "--collect"]) == 0
    rows = json.loads((out / "results.json").read_text())
    assert [r["status"] for r in rows] == ["done", "done"] and rows[0]["losses"]["align"] != rows[1]["losses"]["align"]
    assert all(r["tokens"] == 2 * 2 * 32 and r["seconds"] > 0 for r in rows)
    assert (out / "table.md").read_text().count("done") == 2 and (out / "sweep.png").stat().st_size > 5000
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    assert (out / "runs" / rows[0]["name"] / "run.png").stat().st_size > 5000
    assert main([*sweep, "--index", "2"]) == 1
    assert "expected 0 ... 1" in capsys.readouterr().err
    shutil.move(tmp_path / "sweep.py", tmp_path / "old.py")
    (tmp_path / "sweep.py").write_text((tmp_path / "old.py").read_text().replace("1e-2", "2e-2"))
    assert main([*sweep, "--collect"]) == 1
    assert "holds another sweep" in capsys.readouterr().err


def test_results_of_one_directory_are_of_one_config_and_one_evaluation(sweep, tmp_path, capsys):
    """Points that are done are not run again: a table would mix the old ones with the new."""
    base, text = tmp_path / "base.py", (tmp_path / "sweep.py").read_text()
    assert main([*sweep, "--collect"]) == 0
    for file, old, new, words in (
        (base, "steps=2", "steps=3", "config.phases.align.steps is 3 now and was 2"),
        (tmp_path / "sweep.py", "seed=(0,))", "seed=(0,)), evaluate=dict(rows=5)", "sweep.evaluate.rows is 5 now and was 'absent'"),
        (tmp_path / "sweep.py", "1e-2", "2e-2", "its points are not these"),
    ):
        before = file.read_text()
        file.write_text(before.replace(old, new, 1))
        assert file.read_text() != before and main([*sweep, "--collect"]) == 1
        assert f"holds another sweep: {words}" in capsys.readouterr().err.replace("learning_rate=0.001: ", "")
        file.write_text(before)
    base.write_text(base.read_text().replace("seed=0", "seed=0, mesh=dict(fsdp=1)"))  # another mesh changes no result
    assert main([*sweep, "--collect"]) == 0 and (tmp_path / "sweep.py").read_text() == text


def test_results_of_one_directory_are_of_one_version_of_the_instruments(sweep, tmp_path, capsys):
    """The sweep names the file of an evaluation: points that are done were measured by what it said then."""
    instruments = tmp_path / "evaluate.py"
    instruments.write_text(
        "def get_config():\n"
        "    return dict(data=dict(text='stdlib'), instruments=dict(text=dict(instrument='text', seq_len=32, rows=4)))\n"
    )
    text = (tmp_path / "sweep.py").read_text()
    (tmp_path / "sweep.py").write_text(
        text.replace("seed=(0,))", f"seed=(0,)), evaluate=dict(config={str(instruments)!r}, rows=None)")
    )
    assert main([*sweep, "--collect"]) == 0 == main([*sweep, "--collect"])
    instruments.write_text(instruments.read_text().replace("rows=4", "rows=5"))
    assert main([*sweep, "--collect"]) == 1
    assert "holds another sweep: sweep.evaluate.config.instruments.text.rows is 5 now and was 4" in capsys.readouterr().err


def test_tasks_of_an_array_that_begin_at_the_same_time_have_one_directory(tmp_path, monkeypatch):
    """The first one makes it between the other one's two looks at it."""
    points = points_of(ConfigDict({"configs": ("a.py",)}))

    def claimed(seed, first=None):
        def late(path):
            if first is not None:
                first()
            return new_directory(path)

        monkeypatch.setattr("hybrid_jax.sweep.points.new_directory", late)
        claim(tmp_path / "out", points, [ConfigDict({"seed": seed})], {})

    claimed(0, lambda: claimed(0))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="holds another sweep: a: config.seed is 0 now and was 1"):
        claimed(0, lambda: claimed(1))
    (tmp_path / "out" / "sweep.json").rename(tmp_path / "out" / "notes.json")
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        claimed(0)


def test_processes_of_equal_numbers_write_one_file(tmp_path, monkeypatch):
    """The tasks of an array in containers, or on several machines, may have the same process id."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    written, rename = [], pathlib.Path.rename

    def late(path, target):
        if not written:
            written.append(path)
            write_text(tmp_path / "table.md", "the other's")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", late)
    write_text(tmp_path / "table.md", "ours")
    assert (tmp_path / "table.md").read_text() == "ours" and [p.name for p in tmp_path.iterdir()] == ["table.md"]


def test_a_point_whose_losses_are_not_numbers_is_drawn_beside_the_others(tmp_path):
    rows = [{"name": str(n), "status": "done", "losses": {"x": v}} for n, v in enumerate((math.nan, 2.0, math.inf))]
    draw_sweep([*rows, {"name": "no phase", "status": "done", "losses": {}}], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000


def test_a_point_ended_by_the_system_is_told_with_the_signal(tmp_path, monkeypatch):
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\necho 'align:  33%' >&2\nkill -KILL $$\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert _command("prime") == ("failed", "ended by SIGKILL, after: align:  33%")


def test_a_failed_command_is_told_by_its_message_and_not_by_what_libraries_write_at_its_end(tmp_path, monkeypatch):
    child = tmp_path / "child"
    lines = "print('hybrid-jax prime: the pattern is wrong', file=sys.stderr); print('a library ends', file=sys.stderr)"
    child.write_text(f"#!{sys.executable}\nimport sys; {lines}; sys.exit(1)\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert _command("prime") == ("failed", "hybrid-jax prime: the pattern is wrong")


def test_a_failed_point_of_an_array_is_failed_in_the_table_and_runs_again(tmp_path, monkeypatch):
    (point,) = points_of(ConfigDict({"configs": ("a.py",)}))
    outcomes = [("failed", "no such file"), ("stopped", "later"), ("done", "")]
    monkeypatch.setattr("hybrid_jax.sweep.running._command", lambda *_, **__: outcomes.pop(0))
    monkeypatch.setattr("hybrid_jax.sweep.running.phases_of", lambda _: {"a": [{"loss": 1.0, "tokens": 96}]})
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr("hybrid_jax.sweep.running.time.monotonic", lambda: next(clock))
    for n, want in enumerate(("failed", "stopped", "done"), start=1):
        assert run_point(point, tmp_path, {})["status"] == want
        (row,) = collect(tmp_path, [point], {})  # by another process
        assert (row["status"], row["seconds"]) == (want, 10 * n)  # of all tries
    assert run_point(point, tmp_path, {})["status"] == "done" and outcomes == []
    assert "| done | 96 | 30 | 1.0000 |" in (tmp_path / "table.md").read_text()


def test_models_beside_the_points_are_measured_like_them_and_stand_first(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("hybrid_jax.sweep.running._command", lambda *given, env: calls.append((given, env)) or ("done", ""))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    evaluate = {"config": "c.py", "seq_len": 64, "models": {"source": "dir"}}
    assert measure_models(tmp_path, evaluate) == ("done", "")
    ((given, env),) = calls
    assert given == ("evaluate", "--model=source=dir", f"--out={tmp_path / 'models'}", "--config=c.py", "--seq-len=64")
    assert env["JAX_COMPILATION_CACHE_DIR"] == "mine"  # and not the sweep's, which is the default
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    measure_models(tmp_path, evaluate)
    assert calls[1][1]["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    evaluation, points = Evaluation(TEXT, {"text": "stdlib"}), points_of(ConfigDict({"configs": ("a.py",)}))
    for name, folder, loss in (("source", tmp_path / "models", 2.5), ("it", tmp_path / "runs" / "a" / "evaluation", 2.75)):
        folder.mkdir(parents=True)
        found = weighted_mean("loss", np.full((4, 1), loss), np.ones((4, 1)), "nats/token")
        write_measured([Measured(Target(name, tmp_path), "*", "t", {"text": [found]})], folder / "results.json")
    collect(tmp_path, points, {"a": {"name": "a", "status": "done"}}, evaluation)
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.index("| source | `*` | 2.500") < report.index("| a | `*` | 2.750") < report.index("| a − source | +0.250")


def test_a_failed_point_is_told_and_the_others_run(sweep, tmp_path, capfd):
    text = (tmp_path / "sweep.py").read_text()
    (tmp_path / "sweep.py").write_text(text.replace("seed=(0,)", 'pattern=("*-XYZ", "*-SWA")').replace("(1e-3, 1e-2)", "(1e-3,)"))
    assert main(sweep) == 1
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["status"] for r in rows] == ["failed", "done"] and "XYZ" in rows[0]["error"]
    assert "1 of 2 points failed" in capfd.readouterr().err


TEXT = {"text": make_instrument("text", {"instrument": "text"})}


def test_every_number_of_the_table_stands_in_its_column_and_seeds_are_one_line_of_the_report(tmp_path):
    points = points_of(ConfigDict({"configs": ("a.py",), "grid": {"lr": (1, 2), "seed": (0, 1)}}))
    assert [p.name for p in points] == ["lr=1_seed=0", "lr=1_seed=1", "lr=2_seed=0", "lr=2_seed=1"]
    results = {}
    for point, loss in zip(points[:3], (3.125, 3.375, 2.0), strict=True):
        numbers = {"losses": {"align": 0.5, "train": 2.25}}
        results[point.name] = {"name": point.name, "config": "a.py", "overrides": {}, "status": "done", **numbers}
        found = weighted_mean("loss", np.full((4, 1), loss), np.ones((4, 1)), "nats/token")
        (tmp_path / "runs" / point.name / "evaluation").mkdir(parents=True)
        measured = Measured(Target("it", tmp_path), "*-GKA", "t", {"text": [found]})
        write_measured([measured], tmp_path / "runs" / point.name / "evaluation" / "results.json")
    rows = collect(tmp_path, points, results, Evaluation(TEXT, {"text": "stdlib"}))
    assert [row["measures"].get("text: loss (nats/token)") for row in rows] == [3.125, 3.375, 2.0, None]
    header, _, *lines = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]
    assert dict(zip(header, lines[0], strict=True)) == {
        "point": "lr=1_seed=0",
        "status": "done",
        "tokens": "–",
        "seconds": "–",
        "align loss": "0.5000",
        "train loss": "2.2500",
        "text: loss (nats/token)": "3.125 ± 0.000",
    }
    assert lines[3] == ["lr=2_seed=1", "not run", "–", "–", "–", "–", "–"]
    report = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert [line for line in report if line.startswith("| lr=1")] == ["| lr=1 (2 seeds) | `*-GKA` | 3.250 ± 1.588 |"]
    assert any(line.startswith("| lr=2_seed=0 | ") for line in report)


def test_points_with_lists_in_them_are_grouped_by_their_seeds(tmp_path):
    grid = {"schedule": (["align"], ["align", "train"]), "seed": (0, 1)}
    points = points_of(ConfigDict({"configs": ("a.py",), "grid": grid}))
    loss = weighted_mean("loss", np.ones((4, 1)), np.ones((4, 1)), "nats/token")
    measured = {point.name: Measured(Target("it", tmp_path), "*", "t", {"text": [loss]}) for point in points}
    assert [row.target.name for row in _grouped(points, measured)] == [
        "schedule=_align (2 seeds)",
        "schedule=_align_train (2 seeds)",
    ]


def test_a_misspelt_field_of_the_grid_is_found_before_any_point_runs(sweep, tmp_path, capsys):
    text = (tmp_path / "sweep.py").read_text()
    for wrong, words in (("learning_rat=", "learning_rat"), ("batch_size=", "batch_size")):
        (tmp_path / "sweep.py").write_text(text.replace("learning_rate=", wrong))
        for more in (["--list"], []):
            assert main([*sweep, *more]) == 1
            error = capsys.readouterr().err
            assert "2 of 2 points cannot run" in error and words in error
    assert not (tmp_path / "out").exists()
