"""How fast a phase runs: tokens per second, the share of the peak (MFU), waiting for data, memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from hybrid_jax.flops import traced_flops
from hybrid_jax.hardware import accelerator_of
from hybrid_jax.model import Decoder
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.step import make_step


class Meter:
    """Measures from `begin`, after the first step (which compiles), on.

    MFU needs an accelerator whose peak is known; its FLOPs are the step's without rematerialization.
    """

    def __init__(self, phase: Phase, model: Decoder, teacher: Decoder | None = None):
        self.tokens, self.waited = phase.tokens_per_step, 0.0
        self.first: int | None = None
        self.begun: float | None = None
        self.flops: float | None = None
        self._counted: Callable[..., Any] | None = None
        self.kind = accelerator_of(jax.local_devices()[0].device_kind)
        if self.kind is not None:
            remat, model.remat = model.remat, "none"
            self._counted = make_step(PhaseLayout(model, phase, teacher), phase)
            model.remat = remat

    def count(self, state: Any, frozen: Any, batch: Any) -> None:
        """Counts a step's FLOPs from its arguments; only the first call does anything."""
        if self._counted is not None:
            self.flops, self._counted = traced_flops(self._counted, state, frozen, batch), None

    def begin(self, step: int) -> None:
        """Starts the clock after `step`, the first one; later calls do nothing."""
        if self.first is None:
            self.first, self.begun, self.waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Is a context manager that adds to the time spent waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager whose time counts for nothing: neither as training nor as waiting."""
        begin = time.perf_counter()
        yield
        if self.begun is not None:
            self.begun += time.perf_counter() - begin

    def read(self, step: int) -> dict[str, float]:
        """Returns the tokens read up to `step`, and the speeds, if there is something to measure them by."""
        values: dict[str, float] = {"tokens": step * self.tokens}
        if self.first is not None and self.begun is not None and step > self.first:
            seconds, steps = time.perf_counter() - self.begun, step - self.first
            values |= {"tokens_per_second": steps * self.tokens / seconds, "data_wait": self.waited / seconds}
            if self.kind is not None and self.flops:
                values["mfu"] = steps * self.flops / seconds / (self.kind.flops * jax.device_count())
        if memory := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            values["peak_memory_gb"] = memory / 1e9
        return values
