"""One page of what a check found, for a terminal and for a file."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from hybrid_jax.check.finding import Finding

MARKS = {True: "ok", False: "FAILED", None: ""}


def check_page(findings: Sequence[Finding]) -> str:
    """Returns the page, in Markdown."""
    failed, claims = sum(f.passed is False for f in findings), sum(f.passed is not None for f in findings)
    lines = [f"# hybrid-jax check, {datetime.date.today()}", "", f"{claims - failed} of {claims} claims hold.", ""]
    lines += ["| part | subject | claim | | found |", "| --- | --- | --- | --- | --- |"]
    for f in findings:
        cells = (f.part, f.subject, f.claim, MARKS[f.passed], f.value)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
