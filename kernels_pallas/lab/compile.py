"""Compiles cases for chips that this machine does not have, in separate processes: libtpu reads its options only when it loads."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from kernels_pallas.lab.chips import CHIPS

MARK = "LAB-RESULT "
# The two dumps that `schedule.read_schedules` reads; dumping every pass takes longer than compiling.
DUMPED = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=original|final_"


def compile_cases(chip: str, cases: Sequence[str], shape: dict | None = None, xla: bool = True) -> Iterator[dict]:
    """Yields one result per case, as it is ready: that of `worker.compile_kernels`, with that of `worker.compile_xla` if asked for.

    Args:
      chip: a name in CHIPS.
      cases: names in CASES.
      shape: fields of `Shape` that differ from its defaults.
      xla: whether to compile the XLA form too, for comparison.

    Raises:
      RuntimeError: a compiling process died; the message has the end of its standard error.
      ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"unknown chip {chip!r}; have {', '.join(CHIPS)}")
    with contextlib.ExitStack() as stack:
        dump = stack.enter_context(tempfile.TemporaryDirectory())
        request = dict(chip=chip, cases=list(cases), shape=shape or {})
        forms = [_compiled(stack, request | dict(dump=dump), f"--xla_jf_dump_to={dump} {DUMPED}")]
        if xla:
            forms.append(_compiled(stack, request | dict(dump=None), ""))
        for results in zip(*forms, strict=True):
            yield {k: v for result in reversed(results) for k, v in result.items()}


def _compiled(stack: contextlib.ExitStack, request: dict, options: str) -> Iterator[dict]:
    return worker(stack, "kernels_pallas.lab.worker", request, options, len(request["cases"]))


def worker(stack: contextlib.ExitStack, module: str, request: dict, options: str, count: int) -> Iterator[dict]:
    """Starts a process that compiles, and returns an iterator over its results.

    Args:
      stack: ends the process.
      module: what runs; it takes the request as JSON and prints lines that begin with `MARK`, a result as JSON in each.
      request: has the `chip`.
      options: of libtpu.
      count: how many results must come.

    Raises:
      RuntimeError: by the iterator: the process ended before; the message has the end of its standard error.
    """
    env = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", LIBTPU_INIT_ARGS=options)
    errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
    command = [sys.executable, "-m", module, json.dumps(request)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    stack.callback(process.wait)
    stack.callback(process.kill)

    def results():
        done = 0
        for line in process.stdout or ():
            if line.startswith(MARK):
                done += 1
                yield json.loads(line[len(MARK) :])
        if process.wait() or done < count:
            errors.seek(0)
            text = errors.read()[-3000:]
            raise RuntimeError(f"compiling for {request['chip']} ended after {done} of {count} cases:\n{text}")

    return results()
