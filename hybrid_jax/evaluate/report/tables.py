"""The tables of an evaluation: one line per model; every series of an instrument; differences to the source; all numbers."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from hybrid_jax.data import read_sources
from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.instruments.text import TextLoss
from hybrid_jax.evaluate.measured import Measured
from hybrid_jax.evaluate.measurement import Measurement, difference
from hybrid_jax.evaluate.report.document import Table

NOTHING_LOST = 0.02  # nats per token
NOTHING = "–"
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


class Column(NamedTuple):
    """One measurement of an instrument: its title, the instrument and `Measurement.key`."""

    title: str
    instrument: str
    key: tuple


def show(m: Measurement | None, signed: bool = False) -> str:
    """Returns a measurement for a reader: `2.475 ± 0.012`, `96.9 % (95.1–98.0)`, `1.50 MiB`.

    Args:
      signed: the number is a difference.
    """
    if m is None or math.isnan(m.value):
        return NOTHING if m is None else "not a number"
    if m.unit == "share":
        if signed:
            return f"{100 * m.value:+.1f} ± {50 * (m.high - m.low):.1f} points"
        return f"{100 * m.value:.1f} % ({100 * m.low:.1f}–{100 * m.high:.1f})"
    if m.unit == "bytes":
        name, size = next((u for u in UNITS if abs(m.value) >= u[1]), ("bytes", 1))
        return f"{m.value / size:.{0 if size == 1 else 2}f} {name}"
    if m.low == m.value == m.high and float(m.value).is_integer():
        return f"{m.value:,.0f}"
    if m.unit == "tokens/s":
        return f"{m.value:,.0f} ± {(m.high - m.low) / 2:,.0f}"
    return f"{m.value:{'+' if signed else ''}.3f} ± {(m.high - m.low) / 2:.3f}"


def find(row: Measured, instrument: str, key: tuple) -> Measurement | None:
    """Returns a measurement of a model, or None."""
    return next((m for m in row.results.get(instrument, ()) if m.key == key), None)


def place(m: Measurement) -> str:
    """Returns in words where something was measured."""
    return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in m.at.items())


def columns(evaluation: Evaluation, rows: Sequence[Measured]) -> list[Column]:
    """Returns the columns of the first table: every instrument's headline."""
    found = []
    for name, instrument in evaluation.instruments.items():
        measurements = [m for row in rows for m in row.results.get(name, ())]
        for headline in instrument.headline:
            measure, _, coordinate = headline.partition(" ")
            wanted = [m for m in measurements if m.measure == measure and list(m.at) == ([coordinate] if coordinate else [])]
            if not wanted:
                continue
            m = wanted[0]
            unit = f" ({m.unit})" if m.unit not in ("", "share", "bytes") else ""
            where = f" at {place(m)}" if m.at else ""
            found.append(Column(f"{name}: {measure.replace('_', ' ')}{where}{unit}", name, m.key))
    return found


def source_of(row: Measured, rows: Sequence[Measured]) -> Measured | None:
    """Returns the model that `row`'s run was made from: the one in its source's directory, else the only one with its tokenizer.

    None: no model is known to be the source.
    """
    models = [r for r in rows if not r.target.run and r.tokenizer == row.tokenizer]
    source = row.target.source
    own = [r for r in models if source and os.path.realpath(r.target.path) == os.path.realpath(source)]
    return own[0] if own else models[0] if len(models) == 1 else None


def recovered(row: Measured, rows: Sequence[Measured], text: str) -> float | None:
    """Returns the fraction of the held-out loss increase caused by stage 0 that `row` has recovered.

    None for a source and for stage 0 itself, where no model is known to be the source (see `source_of`), and where stage 0 lost
    less than `NOTHING_LOST`, so that there is nothing to recover.

    Args:
      text: the name of the instrument whose loss it is.
    """
    run, source = row.target.run, source_of(row, rows)
    starts = [r for r in rows if r.target.run == run and r.target.stage == 0]
    if not run or source is None or not starts or row.target.stage == 0:
        return None
    losses = [find(r, text, ("loss",)) for r in (starts[0], source, row)]
    if any(m is None for m in losses):
        return None
    start, best, now = (m.value for m in losses if m is not None)
    return None if start - best < NOTHING_LOST else (start - now) / (start - best)


def first_table(evaluation: Evaluation, rows: Sequence[Measured]) -> Table:
    """Returns the table with a line per model and the headline of every instrument.

    Where a run is among the models, the share of its lost loss that was recovered stands behind the first instrument of text.
    """
    shown = columns(evaluation, rows)
    text = next((name for name, one in evaluation.instruments.items() if isinstance(one, TextLoss)), None)
    shares = [recovered(r, rows, text) for r in rows] if text and any(r.target.run for r in rows) else []
    header, lines = ["model", "pattern"], [[r.target.name, r.pattern] for r in rows]
    for column in shown:
        header.append(column.title)
        for line, row in zip(lines, rows, strict=True):
            line.append(show(find(row, column.instrument, column.key)))
        if shares and column.instrument == text:
            header.append("share of the lost loss recovered")
            for line, share in zip(lines, shares, strict=True):
                line.append(NOTHING if share is None else f"{100 * share:.1f} %")
    return Table(tuple(header), [tuple(line) for line in lines], code=(1,))


def difference_table(evaluation: Evaluation, rows: Sequence[Measured]) -> Table | None:
    """Returns the differences of the headlines to the source's, of a model without a run to the first model's.

    They are means over differences of rows, see `difference`. None: nothing can be compared.
    """
    shown, lines, used = columns(evaluation, rows), [], set()
    for row in rows:
        models = [r for r in rows if not r.target.run and r.tokenizer == row.tokenizer]
        source = source_of(row, rows) if row.target.run else models[0]
        if source is None or source is row:
            continue
        cells = []
        for n, c in enumerate(shown):
            one, other = find(row, c.instrument, c.key), find(source, c.instrument, c.key)
            gap = difference(one, other) if one is not None and other is not None else None
            used |= {n} if gap is not None else set()
            cells.append(show(gap, signed=True))
        lines.append((f"{row.target.name} − {source.target.name}", cells))
    if not used:
        return None
    kept = [n for n in range(len(shown)) if n in used]
    header = ("difference", *(shown[n].title for n in kept))
    return Table(header, [(name, *(cells[n] for n in kept)) for name, cells in lines])


def series(rows: Sequence[Measured], instrument: str) -> dict[tuple[str, tuple[str, ...]], list[tuple]]:
    """Returns (measure, names of the coordinates) -> the keys at which models were measured, in order."""
    found: dict[tuple[str, tuple[str, ...]], list[tuple]] = {}
    for row in rows:
        for m in row.results.get(instrument, ()):
            if m.at:
                keys = found.setdefault((m.measure, tuple(m.at)), [])
                keys += [m.key] if m.key not in keys else []
    return found


def series_table(rows: Sequence[Measured], instrument: str, keys: Sequence[tuple]) -> Table:
    """Returns a table with a line per place and a column per model."""
    example = {m.key: m for row in reversed(rows) for m in row.results.get(instrument, ())}
    lines = [(place(example[key]), *(show(find(row, instrument, key)) for row in rows)) for key in keys]
    return Table((example[keys[0]].measure.replace("_", " "), *(row.target.name for row in rows)), lines)


def notes(evaluation: Evaluation, rows: Sequence[Measured]) -> list[str]:
    """Returns what a reader of the tables must know, one sentence per note."""
    found, groups = [], {}
    for row in rows:
        groups.setdefault(row.tokenizer, []).append(row.target.name)
    if len(groups) > 1:
        named = "; ".join(", ".join(names) for names in groups.values())
        found.append(f"the models have {len(groups)} different tokenizers ({named}): compare losses per token only within a group.")
    for name, instrument in evaluation.instruments.items():
        if not isinstance(instrument, TextLoss):
            continue
        read = [m.count for m in (find(row, name, ("loss",)) for row in rows) if m is not None and m.sums]
        wanted = instrument.rows * len(instrument.sources or read_sources(evaluation.data))
        if read and min(read) < wanted:
            found.append(
                f"{name}: the held-out text has only {min(read):,} rows, not the {wanted:,} asked for; all of them were read."
            )
    if set_to := [f"{row.target.name} {row.target.iterations}" for row in rows if row.target.iterations]:
        found.append(
            f"iterations of Gated KalmaNet, in all its layers or as LAYER:N, in place of config.json's: {'; '.join(set_to)}."
        )
    for run, row in {r.target.run: r for r in rows if r.target.run and r.target.source}.items():
        source, own = source_of(row, rows), row.target.source
        if source is None and any(not r.target.run for r in rows):
            found.append(f"what {run} recovered is not known: its source {own} is not among the models.")
        elif source is not None and os.path.realpath(source.target.path) != os.path.realpath(own):
            found.append(f"what {run} recovered is of the loss to {source.target.name}; its own source is {own}.")
    return found


def all_numbers(rows: Sequence[Measured]) -> str:
    """Returns CSV with a line per number: model, pattern, run, stage, instrument, measure, where, value, interval, unit, count."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "pattern", "run", "stage", "instrument", "measure", "at", "value", "low", "high", "unit", "count"))
    for row in rows:
        t = row.target
        for name, measurements in row.results.items():
            for m in measurements:
                where = ";".join(f"{k}={v}" for k, v in m.at.items())
                writer.writerow(
                    (t.name, row.pattern, t.run, t.stage, name, m.measure, where, m.value, m.low, m.high, m.unit, m.count)
                )
    return text.getvalue()
