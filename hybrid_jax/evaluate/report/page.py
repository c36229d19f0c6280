"""Writing the files of a report."""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Sequence

from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.measured import Measured, write_measured
from hybrid_jax.evaluate.report.document import Block, Code, Heading, Picture, Text, as_html, as_markdown
from hybrid_jax.evaluate.report.pictures import draw_recovery, draw_series
from hybrid_jax.evaluate.report.tables import all_numbers, difference_table, first_table, notes, series, series_table
from hybrid_jax.files import write_text

INTERVALS = "Intervals are of 95 %, over the rows of data; of several seeds, over the seeds. A ± is half of an interval's width."
PAIRED = (
    "The same, as differences on the same rows: what makes a row hard for every model drops out, so the intervals are narrower."
)
RECOVERY, RESULTS = "recovery.png", "results.json"


def write_report(
    evaluation: Evaluation,
    rows: Sequence[Measured],
    out: pathlib.Path,
    title: str = "Evaluation",
    continuations: Sequence[tuple[str, str]] = (),
) -> pathlib.Path:
    """Writes report.md, report.html, table.tex, results.csv, results.json and the pictures; returns the path of report.md.

    Args:
      title: of the page.
      continuations: (model, text that it wrote), shown at the end.
    """
    table = first_table(evaluation, rows)
    blocks: list[Block] = [Heading(title, 1), table, Text(INTERVALS), *map(Text, notes(evaluation, rows))]
    if draw_recovery(evaluation, rows, out / RECOVERY):
        blocks.append(Picture(out / RECOVERY, "each measure over the stages of the runs"))
    if (gaps := difference_table(evaluation, rows)) is not None:
        blocks += [Heading("Differences to the source, or to the first model"), Text(PAIRED), gaps]
    taken: set[str] = set()
    for name in evaluation.instruments:
        blocks += _instrument(rows, name, out, taken)
    if continuations:
        blocks.append(Heading("Continuations (greedy)"))
        for model, text in continuations:
            blocks += [Heading(model, 3), Code(text)]
    write_text(out / "report.md", as_markdown(blocks))
    write_text(out / "report.html", as_html(blocks))
    write_text(out / "table.tex", table.latex())
    write_text(out / "results.csv", all_numbers(rows))
    write_measured(rows, out / RESULTS)
    return out / "report.md"


def _instrument(rows: Sequence[Measured], name: str, out: pathlib.Path, taken: set[str]) -> list[Block]:
    """Returns the blocks of an instrument that measured at places: a heading, and a picture and a table per measure.

    Args:
      taken: names of the page's pictures, to which its own are added.
    """
    blocks: list[Block] = []
    for (measure, coordinates), keys in series(rows, name).items():
        over = " and ".join(c.replace("_", " ") for c in coordinates)
        stem = re.sub(r"[^A-Za-z0-9-]+", "_", f"{name}_{measure}_{over}")
        if stem in taken:  # of an instrument whose name differs by a character that no file's name has here
            stem = next(f"{stem}-{n}" for n in itertools.count(2) if f"{stem}-{n}" not in taken)
        taken.add(stem)
        path = out / f"{stem}.png"
        blocks.append(Heading(f"{name}: {measure.replace('_', ' ')} by {over}"))
        if draw_series(rows, name, keys, path):
            blocks.append(Picture(path, f"{name}: {measure} by {over}"))
        blocks.append(series_table(rows, name, keys))
    return blocks
