"""Running one point of a sweep, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hybrid_jax.files import write_text
from hybrid_jax.iterations import as_text, read_iterations
from hybrid_jax.run_report import final_loss, phases_of
from hybrid_jax.sweep.points import ITERATIONS, MODELS, Point

EVALUATION = "evaluation"  # the folder of a point's results, in its working directory
STOPPED = 3  # the exit code of a run that can be resumed
WAITING = b"sweep: waiting until the running point has saved its state; Ctrl-C again ends it at once\n"


def run_point(point: Point, out: pathlib.Path, evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """Runs or finishes a point in a process of its own, and returns its outcome.

    The outcome is kept; a point that failed or was stopped runs again, and goes on where it was.

    `status` is done, failed (with `error`) or stopped; `losses` the last of each phase; `tokens` how many it was trained on;
    `seconds` how long its commands ran, all tries together (but for one that was killed). What an evaluation measures is in the
    point's `evaluation/`.

    Args:
      evaluate: options of `hybrid-jax evaluate`; empty: points are not evaluated.
    """
    kept = out / "results" / f"{point.name}.json"
    earlier = json.loads(kept.read_text()) if kept.exists() else {}
    if earlier.get("status") == "done":
        return earlier
    begin, workdir = time.monotonic(), out / "runs" / point.name
    result = {"name": point.name, "config": point.config, "overrides": dict(point.overrides), "status": "done"}
    env = _sharing_programs(out)
    status, error = _command("prime", *point.arguments, f"--workdir={workdir}", env=env)
    if status == "done":
        phases = phases_of(workdir)
        result["losses"] = {name: final_loss(rows) for name, rows in phases.items()}
        result["tokens"] = sum(rows[-1].get("tokens", 0) for rows in phases.values())
        if evaluate:
            status, error = _evaluate({"it": str(workdir / "model")}, workdir / EVALUATION, evaluate, env)
    if status != "done":
        result |= {"status": status, "error": error}
    result["seconds"] = earlier.get("seconds", 0.0) + time.monotonic() - begin
    kept.parent.mkdir(exist_ok=True)
    write_text(kept, json.dumps(result, indent=1) + "\n")
    return result


MESSAGE = "hybrid-jax "  # how the line begins in which a command says why it failed


def measure_models(out: pathlib.Path, evaluate: Mapping[str, Any]) -> tuple[str, str]:
    """Measures the models that a sweep is compared with, into `out/models`; returns a status and an error, see `run_point`."""
    options = {key: value for key, value in evaluate.items() if key != ITERATIONS}
    return _evaluate(evaluate[MODELS], out / MODELS, options, _sharing_programs(out))


def _evaluate(models: Mapping[str, str], out: pathlib.Path, evaluate: Mapping[str, Any], env: Mapping[str, str]) -> tuple[str, str]:
    given = [f"--model={name}={path}" for name, path in models.items()]
    options = {k: as_text(read_iterations(k, v)) if k == ITERATIONS else v for k, v in evaluate.items() if k != MODELS}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    return _command("evaluate", *given, f"--out={out}", *flags, env=env)


def _sharing_programs(out: pathlib.Path) -> dict[str, str]:
    """Returns an environment in which the commands of a sweep keep the programs that XLA compiles: points share most of them."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str((out / "compiled").absolute()), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    return {**kept, **os.environ}


def _command(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Runs a command to its end: (`done`, `failed` or `stopped`, its message or the last line of its errors).

    While it runs, SIGINT and SIGTERM to this process become one SIGTERM to the command, which then saves and ends; this
    process waits for it. A second SIGINT kills it. (A signal to the process group reaches the command directly as well,
    which changes nothing.)
    """
    process = subprocess.Popen([sys.executable, "-m", "hybrid_jax", *arguments], stderr=subprocess.PIPE, text=True, env=env)
    last = ""
    with _passing_signals(process) as received:
        for line in process.stderr or ():
            sys.stderr.write(line)
            if not last.startswith(MESSAGE):  # libraries may write more when the process ends
                last = line.strip() or last
        code = process.wait()
    if code == 0:
        return ("stopped" if received else "done"), "stopped between two commands" if received else ""
    if code < 0:
        last = f"ended by {signal.Signals(-code).name}, after: {last}"
    return ("stopped" if received or code == STOPPED else "failed"), last


@contextlib.contextmanager
def _passing_signals(process: subprocess.Popen) -> Iterator[list[int]]:
    """The signals received in this block, in order; see `_command`. Other threads than the main one leave signals alone."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            process.kill()
        elif not received:
            os.write(2, WAITING)  # print() could interrupt a print of the block, and Python refuses that
            process.terminate()
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
