"""The table of an evaluation, as text and Markdown, and the picture of a recovery."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOTHING_LOST = 0.02  # nats per token
LINES = ("--", ":", "-.", (0, (1, 4)))  # of the models in the picture


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's measures.

    Args:
      text_loss: nats per token of held-out text.
      run, stage: `run` groups the stages of one hybrid, `stage` numbers them from 0.
      tokenizer: identifies the tokenizer; losses per token are comparable only between equal ones.
      source: of a run, the directory of the model that it was made from.
      text_rows: how many rows of held-out text were read.
    """

    name: str
    path: str
    pattern: str
    text_loss: float
    retrieval_accuracy: float
    run: str = ""
    stage: int = 0
    tokenizer: str = ""
    source: str = ""
    text_rows: int = 0


def source_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Returns the model that `row`'s run was made from: the one in its source's directory, else the only one with its tokenizer.

    None: no model is known to be the source.
    """
    models = [r for r in rows if not r.run and r.tokenizer == row.tokenizer]
    own = [r for r in models if row.source and os.path.realpath(r.path) == os.path.realpath(row.source)]
    return own[0] if own else models[0] if len(models) == 1 else None


def recovered(row: Row, rows: Sequence[Row]) -> float | None:
    """Returns the fraction of the held-out loss increase caused by stage 0 that `row` has recovered.

    None for a source and for stage 0 itself, where no model is known to be the source (see `source_of`), and where stage 0 lost
    less than `NOTHING_LOST`, so that there is nothing to recover.
    """
    source, starts = source_of(row, rows), [r for r in rows if r.run == row.run and r.stage == 0]
    if not row.run or source is None or not starts or row.stage == 0:
        return None
    lost = starts[0].text_loss - source.text_loss
    return None if lost < NOTHING_LOST else (starts[0].text_loss - row.text_loss) / lost


HEADER = ("model", "pattern", "held-out loss (nats/token)", "share of the lost loss recovered", "retrieval, 16 pairs")


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the cells of the table, as text, one tuple per model in the order of `HEADER`."""
    cells = []
    for row in rows:
        share = recovered(row, rows)
        cells.append(
            (
                row.name,
                row.pattern,
                f"{row.text_loss:.3f}",
                "–" if share is None else f"{100 * share:.1f} %",
                f"{100 * row.retrieval_accuracy:.1f} %",
            )
        )
    return cells


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns the table in Markdown."""
    code = [(name, f"`{pattern}`", *rest) for name, pattern, *rest in table_cells(rows)]  # a bare * is emphasis
    lines = [HEADER, tuple("---" for _ in HEADER), *code]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def notes(rows: Sequence[Row], asked: int = 0) -> list[str]:
    """Returns what a reader of the table must know, one sentence per note.

    Args:
      asked: how many rows of held-out text should have been read.
    """
    found, groups = [], {}
    for row in rows:
        groups.setdefault(row.tokenizer, []).append(row.name)
    if len(groups) > 1:
        named = "; ".join(", ".join(names) for names in groups.values())
        found.append(f"the models have {len(groups)} different tokenizers ({named}): compare losses per token only within a group.")
    short = {row.text_rows for row in rows if 0 < row.text_rows < asked}
    if short:
        found.append(f"the held-out text has only {min(short):,} rows, not the {asked:,} asked for; all of them were read.")
    for run, row in {r.run: r for r in rows if r.run and r.source}.items():
        source = source_of(row, rows)
        if source is None and any(not r.run for r in rows):
            found.append(f"what {run} recovered is not known: its source {row.source} is not among the models.")
        elif source is not None and os.path.realpath(source.path) != os.path.realpath(row.source):
            found.append(f"what {run} recovered is of the loss to {source.name}; its own source is {row.source}.")
    return found


def draw_recovery(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Draws held-out loss and retrieval accuracy over the stages: one line per run, a dashed line per source."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    runs = list(dict.fromkeys(r.run for r in rows if r.run))
    measures = (("text_loss", "held-out loss (nats/token)", 1), ("retrieval_accuracy", "retrieval of 16 pairs (%)", 100))
    for axis, (field, label, factor) in zip(axes, measures, strict=True):
        for n, source in enumerate(r for r in rows if not r.run):
            style = LINES[n % len(LINES)]
            axis.axhline(factor * getattr(source, field), color="black", linestyle=style, label=source.name)
        for run in runs:
            stages = sorted((r for r in rows if r.run == run), key=lambda r: r.stage)
            names = [r.name.removeprefix(run).strip() for r in stages]
            axis.plot(names, [factor * getattr(r, field) for r in stages], marker="o", label=run)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
