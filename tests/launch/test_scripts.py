"""The launch scripts, with the tools they call replaced by stand-ins that say how they were called."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import cpu_devices, free_port

ROOT = pathlib.Path(__file__).parent.parent.parent
COMMAND = ["prime", "--config=configs/prime_tiny.py:GKA", "--workdir=/data/my run"]
QUOTED = r"prime --config=configs/prime_tiny.py:GKA --workdir=/data/my\ run"


@pytest.fixture
def stand_ins(tmp_path):
    """Puts stand-ins first on PATH; returns a function that runs a script and yields (exit code, calls)."""

    def run(script, *arguments, failing=None, env=None):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        for name in ("gcloud", "xpk", "srun"):
            tool = tmp_path / name
            fail = "exit 7" if name == failing else "exit 0"
            tool.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name}" "$@" >> {calls}\necho END >> {calls}\n{fail}\n')
            tool.chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **(env or {})}
        done = subprocess.run([ROOT / "launch" / script, *arguments], env=env, capture_output=True, text=True, check=False)
        said = calls.read_text().split("\nEND\n") if calls.exists() else []
        return done.returncode, [call.split("\n") for call in said if call], done.stderr

    return run


def test_a_tpu_vm_gets_the_code_and_the_command_on_every_worker(stand_ins):
    code, calls, _ = stand_ins("tpu_vm.sh", "pod", "us-east5-a", *COMMAND)
    assert code == 0 and [c[4] for c in calls] == ["scp", "ssh"]
    assert all("--worker=all" in c and "--zone=us-east5-a" in c for c in calls)
    assert calls[1][-1].endswith(f"ACCELERATOR=tpu ./launch/host.sh {QUOTED} ")
    assert stand_ins("tpu_vm.sh", "pod", "us-east5-a", *COMMAND, failing="gcloud")[0] == 7


def test_gke_gets_one_workload(stand_ins):
    code, calls, _ = stand_ins("gke.sh", "cluster", "v5p-128", "mine", *COMMAND)
    assert code == 0 and calls[0][:3] == ["xpk", "workload", "create"]
    assert calls[0][-1] == f"ACCELERATOR=tpu ./launch/host.sh {QUOTED} "
    assert calls[0][calls[0].index("--tpu-type") + 1] == "v5p-128"


def test_slurm_starts_one_process_a_node_and_ends_with_the_first_failure(stand_ins):
    code, calls, _ = stand_ins("slurm.sh", *COMMAND, env={"SLURM_SUBMIT_DIR": str(ROOT)})
    assert code == 0 and calls == [["srun", "--kill-on-bad-exit=1", "./launch/host.sh", *COMMAND]]
    assert stand_ins("slurm.sh", *COMMAND, failing="srun", env={"SLURM_SUBMIT_DIR": str(ROOT)})[0] == 7


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_missing_arguments_are_said(stand_ins, script):
    code, calls, errors = stand_ins(script)
    assert code == 2 and not calls and "usage:" in errors


def test_slurm_s_environment_is_enough_to_find_each_other():
    job = str(free_port())
    program = "import jax, hybrid_jax.parallel.distributed as d; d.initialize(); print(jax.process_index(), jax.device_count())"
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    env = {**cpu_devices(1), **slurm}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env={**env, "SLURM_PROCID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["0 2", "1 2"]


def test_the_newest_versions_need_a_newer_python(tmp_path):
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        (tmp_path / name).write_text("#!/usr/bin/env bash\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    for name in ("PYTHON", "PYENV_ROOT"):
        env.pop(name, None)
    done = subprocess.run([ROOT / "launch" / "test_newest.sh"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "needs Python 3.12 or newer" in done.stderr


def test_the_newest_environment_has_what_the_project_and_its_tests_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["data"]]
    needed += (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0] for line in needed if not line.startswith("#")} - {"pyright"}
    newest = (ROOT / "tests" / "requirements-newest.txt").read_text().splitlines()
    assert names == {re.match(r"[\w-]+", line)[0] for line in newest if not line.startswith("#")}
