"""Compiles cases for chips that are not there, in a process of its own: libtpu reads its options once, when it loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from kernels_pallas.lab.chips import CHIPS

MARK = "LAB-RESULT "


def compile_cases(chip: str, cases: Sequence[str], shape: dict | None = None, xla: bool = True) -> Iterator[dict]:
    """One result a case (see `worker.compile_case`), as they come.

    Args:
      chip: a name in CHIPS.
      cases: names in CASES.
      shape: fields of `Shape` that differ from its defaults.
      xla: whether to compile the XLA form too, for comparison.

    Raises:
      RuntimeError: the compiling process died; with what it said last.
      ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"unknown chip {chip!r}; have {', '.join(CHIPS)}")
    with tempfile.TemporaryDirectory() as dump:
        env = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        )
        request = json.dumps(dict(chip=chip, cases=list(cases), shape=shape or {}, dump=dump, xla=xla))
        command = [sys.executable, "-m", "kernels_pallas.lab.worker", request]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as process,
        ):
            done = 0
            for line in process.stdout:
                if line.startswith(MARK):
                    done += 1
                    yield json.loads(line[len(MARK) :])
            if process.wait() or done < len(cases):
                errors.seek(0)
                raise RuntimeError(f"compiling for {chip} ended after {done} of {len(cases)} cases:\n{errors.read()[-3000:]}")
