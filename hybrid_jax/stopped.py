"""Asking a command to stop, by Ctrl-C (SIGINT) or SIGTERM; light, so that the command line need not import the training stack."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Self

EXIT_CODE = 3  # of a command that was stopped; the shell's `prime && export` does not go on
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it."""


class _Signals:
    """A block within which SIGINT and SIGTERM go to `_handle`, in the main thread, and to `_hear`, in a thread of its own.

    Python runs handlers in the main thread, between two of its instructions: not while XLA compiles or computes there. The
    second thread reads the signals' numbers from a pipe (`signal.set_wakeup_fd`), and can answer at once.

    Outside of the main thread, where Python allows no handlers, the block does nothing.

    Args:
      name: what is running, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
            self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def _listen(self) -> None:
        heard = 0
        while numbers := os.read(self._pipe, 64):
            for number in filter(SIGNALS.__contains__, numbers):
                heard += 1
                self._hear(number, heard)

    def __exit__(self, *_: object) -> None:
        if self._previous:
            for s, handler in self._previous.items():
                signal.signal(s, handler)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._write)
            self._thread.join()
            os.close(self._pipe)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Python's handler of the signal `number`."""
        raise NotImplementedError

    def _hear(self, number: int, heard: int) -> None:
        """Answers the signal `number` at once; it is number `heard` of those received, counted from 1."""
        raise NotImplementedError


class StopRequest(_Signals):
    """A block within which SIGINT and SIGTERM set `asked` instead of ending the program, and are answered on stderr at once.

    A Ctrl-C after that ends the process immediately, with the same exit code. A second SIGTERM does not, because launchers
    send it to a process and to its group.
    """

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.asked = True

    def _hear(self, number: int, heard: int) -> None:
        self.asked = True
        if heard == 1:
            _tell(
                f"{self.name}: stopping after the step that is under way, and saving; a first step is compiled before, which can "
                "take minutes. Press Ctrl-C again to end at once, without saving"
            )
        elif number == signal.SIGINT:
            _tell(f"{self.name}: ended without saving; the same command resumes from the last checkpoint")
            os._exit(EXIT_CODE)


class Terminable(_Signals):
    """A block within which SIGTERM raises KeyboardInterrupt, as Ctrl-C does.

    A second signal ends the process if the first one still waits for a computation.
    """

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGTERM:
            return  # launchers send it to a process and to its group; the first one is being answered
        self.asked = True
        raise KeyboardInterrupt

    def _hear(self, number: int, heard: int) -> None:
        if heard == 1:
            time.sleep(0.3)
            if not self.asked:
                _tell(f"{self.name}: stopping when the computation that is under way is done; press Ctrl-C again to end at once")
        elif not self.asked:
            _tell(f"{self.name}: ended")
            os._exit(EXIT_CODE)


def _tell(text: str) -> None:
    """Prints to stderr on a line of its own, also where a progress bar is drawn."""
    print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
