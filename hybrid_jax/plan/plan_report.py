"""Formats a plan as a table and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hybrid_jax.config import MixerSpec
from hybrid_jax.memory import state_bytes, state_bytes_by_kind
from hybrid_jax.plan.planner import Plan, mesh_text

CONTEXTS = (16384, 32768, 65536, 131072)  # tokens, rows of the table of caches


def _bytes(n: float) -> str:
    """Formats a number of bytes with its unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1e3:.1f} kB"


def plan_rows(plan: Plan, tokens: float, efficiency: float) -> list[tuple[str, str]]:
    """Returns the lines of the table as (label, value).

    Args:
      plan: what to show.
      tokens: to train on, for the hours.
      efficiency: the fraction of the bound's speed that is reached, for the hours.
    """
    job, floors = plan.job, plan.floors
    compiled = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "by formula, not compiled"
    rows = [
        ("job", f"{job.title}, {job.config.family}, {job.config.num_layers} layers, {mixers(plan)}"),
        ("on", f"{plan.topology} ({plan.devices} devices), mesh {mesh_text(plan.mesh)}, {compiled}"),
        ("per step", f"{job.rows} rows of {job.seq_len:,} tokens" + ("" if job.program == "decode" else f", remat {job.remat}")),
        ("fits", _verdict(plan)),
        ("  parameters", _bytes(plan.parameters)),
    ]
    if plan.teacher:
        rows.append(("  of which the teacher's own copies", _bytes(plan.teacher)))
    if job.program == "decode":
        rows.append(("  caches and states", _bytes(plan.caches)))
    else:
        rows += [("  optimizer", _bytes(plan.optimizer)), ("  activations kept", _bytes(plan.kept))]
    if plan.temporaries is not None:
        rows.append(("  temporaries", _bytes(plan.temporaries)))
    if plan.advice:
        rows.append(("instead", plan.advice))
    if not plan.compiled or plan.fits:  # of a program that does not fit, what it sends is of no interest
        kinds = ", ".join(f"{kind} {_bytes(n)}" for kind, n in sorted(plan.wire.items(), key=lambda w: -w[1]) if n)
        rows.append(("wire per device and step", f"{_bytes(sum(plan.wire.values()))}" + (f" ({kinds})" if kinds else "")))
    rows += [
        ("FLOPs", f"{plan.flops / job.tokens:.3e} per token, {plan.flops:.3e} per step"),
        ("floor of a step", f"{plan.floor:.3g} s (" + ", ".join(f"{k} {v:.3g}" for k, v in floors.items()) + ")"),
    ]
    if plan.parts:
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in plan.parts.items())
        rows.append(("parts of a step, at least", f"{sum(plan.parts.values()):.3g} s ({parts})"))
    share = "" if efficiency == 1 else f" at {efficiency:.0%} of that speed"
    if job.program == "decode":
        rows.append(("tokens per second", f"at most {job.tokens / plan.bound * efficiency:,.0f}{share}"))
    else:
        hours = plan.hours(tokens, efficiency)
        rows.append(("hours", f"at least {hours:,.1f} for {tokens:.3g} tokens{share}"))
    return rows


def _verdict(plan: Plan) -> str:
    """Says whether the plan fits: yes, no, or, for a plan by formula, that this is not known."""
    size = f"{_bytes(plan.total)} of {_bytes(plan.accelerator.hbm)} per device"
    if plan.compiled:
        return f"{'yes' if plan.fits else 'NO'}: {size}"
    return f"{'not known' if plan.fits is None else 'NO'}: at least {size} ({plan.note})"


def mixers(plan: Plan) -> str:
    """Counts the layers by mixer, e.g. `18 GKA, 18 *`."""
    symbols = [s.symbol for s in plan.job.config.layers]
    return ", ".join(f"{symbols.count(s)} {s}" for s in dict.fromkeys(sorted(symbols, key=lambda s: s == "*")))


def plan_table(plan: Plan, tokens: float, efficiency: float) -> Table:
    """Makes the table of `plan_rows`."""
    table = Table(show_header=False, title="plan")
    for row in plan_rows(plan, tokens, efficiency):
        table.add_row(*row)
    return table


def cache_table(plan: Plan) -> Table:
    """Makes a table of caches and states by context and batch: the hybrid's and the source's bytes, all devices together."""
    config = plan.job.config
    source = config.with_pattern([MixerSpec("attention")] * config.num_layers)
    table = Table("context", "sequences", "source", "hybrid", "hybrid / source", "hybrid by mixer", title="caches and states")
    for context in sorted({*CONTEXTS, plan.job.seq_len}):
        for rows in sorted({1, plan.job.rows}):
            a, by_kind = state_bytes(source, context, rows=rows), state_bytes_by_kind(config, context, rows=rows)
            b, parts = sum(by_kind.values()), ", ".join(f"{kind} {_bytes(n)}" for kind, n in by_kind.items())
            table.add_row(f"{context:,}", f"{rows:,}", _bytes(a), _bytes(b), f"{b / a:.2f}", parts)
    return table


def plan_json(plan: Plan, tokens: float, efficiency: float) -> dict[str, Any]:
    """Returns everything in JSON's types, in bytes per device, seconds, hours and FLOPs.

    `fits` is null where it is not known; then `total` is a lower bound and `temporaries` is null. `state_bytes` are those of
    caches and states when the rows are decoded, by mixer and of all devices together; what `tensor` replicates, such as the
    caches of kept heads, counts once.
    """
    fields = ("topology", "mesh", "devices", "fits", "compiled", "parameters", "optimizer", "caches", "kept", "temporaries")
    job = plan.job
    return {
        **{
            name: getattr(plan, name)
            for name in (*fields, "total", "teacher", "wire", "flops", "compile_seconds", "note", "advice")
        },
        "hbm": plan.accelerator.hbm,
        "program": job.program,
        "objective": None if job.program == "decode" else job.phase.objective,
        "pattern": job.config.pattern,
        "state_bytes": state_bytes_by_kind(job.config, job.seq_len, rows=job.rows),
        "rows": job.rows,
        "seq_len": job.seq_len,
        "remat": job.remat,
        "floors": plan.floors,
        "parts": plan.parts,
        "hours": None if job.program == "decode" else plan.hours(tokens, efficiency),
    }
