"""Compiled programs are kept on disk by default, where the user says, or not at all."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from hybrid_jax.commands import compiled
from hybrid_jax.commands.main import COMMANDS, Command, main
from hybrid_jax.parallel import distributed

DIRECTORY, LIMIT = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
OPTIONS = ("jax_enable_compilation_cache", DIRECTORY, LIMIT)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """JAX as it is outside of tests, with the cache on and no directory; where caches go."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    for name, value in zip(OPTIONS, (True, None, -1), strict=True):
        jax.config.update(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def chosen():
    compiled.keep_compiled_programs()
    return jax.config.values[DIRECTORY]


def test_programs_are_kept_in_a_directory_of_this_machine_that_has_a_limit(home, monkeypatch):
    monkeypatch.setattr(compiled.platform, "node", lambda: "a-host")
    assert chosen() == str(home / "hybrid_jax" / "compiled" / "a-host")
    assert jax.config.values[LIMIT] == compiled.LIMIT


def test_the_users_directory_and_limit_stay(home):
    jax.config.update(DIRECTORY, "/elsewhere")
    assert chosen() == "/elsewhere" and jax.config.values[LIMIT] == -1


def test_a_cache_that_is_turned_off_makes_no_directory(home):
    jax.config.update("jax_enable_compilation_cache", False)
    assert chosen() is None and not any(home.iterdir())


def test_several_processes_keep_programs_only_where_the_user_says(home, monkeypatch):
    monkeypatch.setattr(distributed, "in_job", lambda: True)
    assert chosen() is None and not any(home.iterdir())


def test_a_home_that_cannot_be_written_is_said(home, monkeypatch, capsys):
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert chosen() is None and "JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().err


def test_commands_of_jobs_keep_programs(home, tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "kept.py").write_text("def add_arguments(parser): ...\ndef run(args): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "toy", Command("toys.kept", "do nothing", "", job=True))
    assert main(["toy"]) == 0 and jax.config.values[DIRECTORY] == str(compiled.default_directory())


PROGRAM = """
from hybrid_jax.commands.compiled import keep_compiled_programs
import jax
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(jax.jit(lambda x: x * 3)(14.0), sum(name.endswith("cache_hits") for name in hits))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    del env["JAX_COMPILATION_CACHE_DIR"]
    root = pathlib.Path(__file__).parent.parent

    def run():
        return subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=root, capture_output=True, text=True, check=True).stdout

    assert run().split() == ["42.0", "0"] and run().split() == ["42.0", "1"]
