"""Progress bars: redrawn on a terminal; a line now and then where the output goes to a file."""

from __future__ import annotations

import functools
import sys
import time

from tqdm import tqdm

SECONDS = 30.0  # between two lines in a file


class _Lines(tqdm):
    """A bar that is written as lines: at its start, at most every `SECONDS`, and at its end if it has moved since."""

    _written, _shown = float("-inf"), None

    def refresh(self, *_, **__) -> None:
        if not self.disable and time.monotonic() - self._written >= SECONDS:
            self._line()

    def _line(self):
        self._written, self._shown = time.monotonic(), (self.n, self.postfix)
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def close(self) -> None:
        if not self.disable:
            if self._shown != (self.n, self.postfix):
                self._line()
            self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue] (of tqdm, absent from its stubs)
            self.disable = True


def progress_bar(items=None, *, name: str, unit: str, total: int | None = None, done: int = 0, shown: bool = True) -> tqdm:
    """A bar over `items`, or one that `update()` moves, on stderr.

    Args:
      total, done: how many units there are (default: `len(items)`), and how many are done at the start.
      shown: False draws nothing: for all processes of a job but the first.
    """
    bar = functools.partial(tqdm, mininterval=0.5, dynamic_ncols=True)
    if not sys.stderr.isatty():
        bar = functools.partial(_Lines, file=sys.stderr, ncols=100)
    return bar(items, total=total, initial=done, desc=name, unit=unit, disable=not shown)
