"""What an installed package contains beside its modules, and that it is found from every working directory."""

import subprocess
import sys
import zipfile

import pytest

from hybrid_jax import files
from hybrid_jax.config_file import load_config
from hybrid_jax.experiment_config import Experiment
from tests.conftest import GOLDEN

ROOT = GOLDEN.parents[1]


def test_what_ships_is_found_from_every_directory_and_the_user_s_own_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.find_shipped("launch/tiny_qwen3") == ROOT / "launch" / "tiny_qwen3"
    for name in ("configs/prime_tiny.py", "prime_tiny.py"):
        assert files.find_shipped(name) == ROOT / "configs" / "prime_tiny.py"
    for other in ("tests", "README.md", "launch/slurm.sh", "configs/../README.md", "nothing", "."):  # not the package's
        assert str(files.find_shipped(other)) == other
    (tmp_path / "prime_tiny.py").write_text("mine")
    assert str(files.find_shipped("prime_tiny.py")) == "prime_tiny.py"


def test_the_wheel_has_the_configs_and_the_model_that_messages_and_examples_name(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    parts = (
        "hybrid_jax/",
        "kernels_pallas/",
        "configs/",
        "launch/tiny_qwen3/",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    )
    for name in filter(lambda n: n.startswith(parts), listed.stdout.splitlines()):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).symlink_to(ROOT / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    packages = {p.parent.relative_to(tmp_path / "site") for p in (tmp_path / "site").rglob("*.py")}
    assert {p.parent.relative_to(ROOT) for d in ("hybrid_jax", "kernels_pallas") for p in (ROOT / d).rglob("*.py")} <= packages

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "site" / "hybrid_jax" / "shipped")  # as of an installed package
    config = load_config(["--config=prime_tiny.py:GKA"])
    assert [name for name, _ in Experiment.from_config(config).phases] == ["align", "train"]
    model = files.find_shipped(config.source)
    assert model.is_relative_to(tmp_path / "site")
    assert {p.name for p in model.iterdir()} == {p.name for p in (ROOT / "launch" / "tiny_qwen3").iterdir()}
