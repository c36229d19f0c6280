"""Asking a command to stop, by Ctrl-C (SIGINT) or SIGTERM; light, so that the command line need not import the training stack."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

EXIT_CODE = 3  # of a command that was stopped; the shell's `prime && export` does not go on
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it."""


@contextlib.contextmanager
def terminable():
    """Within the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Within the block SIGINT and SIGTERM set `asked` instead of ending the program.

    The first signal is answered on stderr at once, even while the main thread compiles for a minute: Python runs its handlers
    in the main thread, between two of its instructions, and therefore a second thread reads the signals' numbers from a pipe
    (`signal.set_wakeup_fd`). A second Ctrl-C ends the process immediately, with the same exit code; a second SIGTERM does
    not, because launchers send it to a process and to its group.

    Args:
      name: what is running, for the message.

    Outside of the main thread, where Python allows no handlers, `asked` stays False.
    """

    def __init__(self, name: str):
        self.name, self.asked, self._previous = name, False, {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._pipe, write = os.pipe()
            os.set_blocking(write, False)
            self._write, self._previous_fd = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
            self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def _handle(self, *_):
        self.asked = True

    def _listen(self):
        answered = False
        while numbers := os.read(self._pipe, 64):
            for number in filter(SIGNALS.__contains__, numbers):
                if answered and number == signal.SIGINT:
                    _tell(f"{self.name}: ended without saving; the same command resumes from the last checkpoint")
                    os._exit(EXIT_CODE)
                if not answered:
                    _tell(
                        f"{self.name}: stopping after the step that is under way, and saving; a first step is compiled before, "
                        "which can take minutes. Press Ctrl-C again to end at once, without saving"
                    )
                self.asked = answered = True

    def __exit__(self, *_):
        if self._previous:
            for s, handler in self._previous.items():
                signal.signal(s, handler)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._write)
            self._thread.join()
            os.close(self._pipe)


def _tell(text: str):
    """On a line of its own, also where a progress bar is drawn."""
    print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
