"""What a check finds."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the page.

    Args:
      subject: what was looked at.
      claim: what should hold, or what was measured.
      passed: whether it holds; None: a number to read, not a claim.
      value: what was found.
      part: of the check; `run_checks` fills it in.
    """

    subject: str
    claim: str
    passed: bool | None
    value: str
    part: str = ""
