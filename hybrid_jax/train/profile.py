"""A trace of chosen steps for XProf (TensorBoard's profile plugin)."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from hybrid_jax.parallel.distributed import say


class Profile:
    """Around a loop; `before` and `after` every step.

    Args:
      steps: the first and the last one to trace; None: none.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: pathlib.Path):
        self.steps, self.directory, self.running = steps, directory, False

    def before(self, step: int) -> None:
        if self.steps and step == self.steps[0]:
            jax.profiler.start_trace(str(self.directory))
            self.running = True

    def after(self, step: int, result: Any) -> None:
        if self.running and self.steps and step >= self.steps[1]:
            jax.block_until_ready(result)
            self._stop()
            say(f"profile of steps {self.steps[0]} to {self.steps[1]}: {self.directory}")

    def _stop(self):
        jax.profiler.stop_trace()
        self.running = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.running:
            self._stop()
