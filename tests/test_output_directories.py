"""Where the commands may write: nothing is lost to --overwrite, and places that cannot become a directory are refused first."""

import shutil
import subprocess
import sys

import pytest

from hybrid_jax import save_model
from hybrid_jax.commands.main import main
from tests.conftest import tiny_model
from tests.test_commands import fails


@pytest.fixture
def source(tmp_path):
    save_model(tiny_model("*-*"), tmp_path / "source")
    return tmp_path / "source"


def test_overwrite_keeps_the_source_and_everything_that_belongs_to_no_model(source, tmp_path, capsys):
    """Before any work, so that a run with its checkpoints, or the folder that holds the source, cannot be lost."""
    outer = shutil.copytree(source, tmp_path / "outer")
    shutil.copytree(source, outer / "inner")
    for out, start in ((outer, outer / "inner"), (source, source), (outer / "inner", outer)):
        holds = "also holds inner" if out == outer else "is, or is in, the source"
        for command in ("convert", "export"):
            assert holds in fails(capsys, command, start, out, "--overwrite")
    for name in ("README.md", "my_notes.txt", "results.json"):
        (outer / "inner" / name).write_text("x")
        assert f"also holds {name}" in fails(capsys, "convert", source, outer / "inner", "--overwrite")
        (outer / "inner" / name).unlink()
    assert all((folder / "config.json").exists() for folder in (source, outer, outer / "inner"))


def test_places_that_no_directory_can_be_renamed_to_are_refused_before_any_work(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("hybrid_jax.convert.convert_directory", lambda *args, **options: pytest.fail("it was loaded"))
    for out, word in (("../link", "is a link"), ("../dangling", "is a link"), (".", "is the working directory")):
        assert word in fails(capsys, "convert", source, out)
    for report in ("out", "out/report"):
        assert "is in, the output directory out" in fails(capsys, "convert", source, "out", "--verify", report)
    assert not any((tmp_path / "empty").iterdir())


def test_a_model_whose_replacement_was_killed_between_the_renames_is_not_lost(source, tmp_path, capsys):
    out, theirs = shutil.copytree(source, tmp_path / "out"), shutil.copytree(source, tmp_path / ".out.old")
    (out / "merges.txt").write_text("x")
    program = f"""
import os, sys
from hybrid_jax import files
rename = os.rename
def killed_before_the_second(a, b):
    rename(a, b)
    os._exit(9)
files.os.rename = killed_before_the_second
with files.new_directory({str(out)!r}, overwrite=True) as work:
    (work / "config.json").write_text("{{}}")
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    (old,) = tmp_path.glob(".out.old.*")
    assert not out.exists() and (old / "merges.txt").read_text() == "x"
    out.mkdir()  # as a job's script does
    for arguments in (("convert", source, out), ("convert", source, out, "--overwrite"), ("export", out, tmp_path / "other")):
        said = fails(capsys, *arguments)
        assert f"{out} is missing, because a program was killed while it replaced it; the old directory is {old}" in said
    out.rmdir()
    old.rename(out)
    assert main(["convert", str(out), str(tmp_path / "copy")]) == 0
    assert main(["convert", str(source), str(out), "--overwrite"]) == 0
    assert not list(tmp_path.glob(".out.old.*")) and not (out / "merges.txt").exists()
    assert (theirs / "config.json").exists(), "a directory that only has a similar name stays"
