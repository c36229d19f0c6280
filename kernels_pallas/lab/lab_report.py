"""The laboratory's results as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

HEADER = (
    "case",
    "chip",
    "bundles",
    "HBM",
    "around",
    "XLA form",
    "matrix slots",
    "spills",
    "VMEM MiB",
    "bundles per step",
    "temporaries MiB",
    "of XLA",
)
LEGEND = """Per token and head, for all cores of the device: `bundles`, static bundles of the kernels (a lower bound on cycles,
without waits for memory); `HBM`, cycles to move each kernel's arguments and results once; `around`, the compiler's
estimated cycles of the XLA operations around the kernels (on tpu7x its estimates are partly missing); `XLA form`,
its estimate of the portable form, loops multiplied out. `matrix slots`: share used, of the busiest kernel;
`spills`: stores of registers in a grid step; `temporaries`: HBM beside arguments and results."""


def cells(result: dict) -> tuple[str, ...]:
    """Returns one row of the table."""
    if "error" in result:
        return (result["case"], result["chip"], "does not compile", *[""] * 9)
    if not result["kernels"]:
        return (result["case"], result["chip"], "no kernel for these sizes", *[""] * 9)
    kernels = result["kernels"]
    busiest = max(kernels, key=lambda k: k["bundles_token_head"])
    xla = result.get("xla_token_head")
    return (
        result["case"],
        result["chip"],
        f"{result['bundles_token_head']:.2f}",
        f"{result['hbm_cycles_token_head']:.2f}",
        f"{result['around_token_head']:.2f}",
        "–" if xla is None else f"{xla:.1f}",
        f"{100 * busiest['matrix_share']:.0f} %",
        str(sum(k["spill_stores"] for k in kernels)),
        f"{max(k['vmem_bytes'] for k in kernels) / 2**20:.1f}",
        " + ".join(str(k["bundles_grid_step"]) for k in kernels),
        f"{result['temporaries'] / 2**20:.0f}",
        "–" if xla is None else f"{result['xla_temporaries'] / 2**20:.0f}",
    )


def print_table(results: Sequence[dict]) -> None:
    """Prints the results as a table, then the messages of the cases that do not compile."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=LEGEND, caption_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("case", "chip") else "right", no_wrap=name == "case")
    for result in results:
        table.add_row(*cells(result))
    console = Console(width=None if os.isatty(1) else 200)
    console.print(table)
    print_summary(results)
    for result in results:
        if "error" in result:
            console.print(f"{result['case']} on {result['chip']}: {result['error']}", markup=False)


def print_summary(results: Sequence[dict]) -> None:
    """Prints `bundles` / `HBM` of every case by chip, and the temporaries of the first chip."""
    done = {(r["case"], r["chip"]): r for r in results if "error" not in r}
    cases, chips = (list(dict.fromkeys(key[i] for key in done)) for i in (0, 1))
    if not done:
        return
    width = max(33, *(len(case) + 1 for case in cases))
    print(f"{'bundles / HBM':{width}}" + "".join(f"{chip:>16}" for chip in chips) + f"   temporaries MiB, {chips[0]}")
    for case in cases:
        found = [done.get((case, chip)) for chip in chips]
        pairs = ["–" if r is None else f"{r['bundles_token_head']:.1f} / {r['hbm_cycles_token_head']:.1f}" for r in found]
        temporaries = "–" if found[0] is None else f"{found[0]['temporaries'] / 2**20:.0f}"
        print(f"{case:{width}}" + "".join(f"{pair:>16}" for pair in pairs) + f"{temporaries:>{20 + len(chips[0])}}")


def write_json(results: Sequence[dict], path: pathlib.Path) -> None:
    """Writes the results beside their place, then renames the file."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(list(results), indent=1) + "\n")
    beside.rename(path)


def draw(results: Sequence[dict], path: pathlib.Path) -> None:
    """Draws bars for every case and chip: the kernels' bundles beside the XLA form's estimate, and the HBM floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [r for r in results if "error" not in r]
    if not done:
        return
    chips = list(dict.fromkeys(r["chip"] for r in done))
    figure, axes = plt.subplots(1, len(chips), figsize=(1.5 + 4 * len(chips), 1.2 + 0.45 * len(done) / len(chips)), sharey=True)
    for axis, chip in zip(axes if len(chips) > 1 else [axes], chips, strict=True):
        rows = [r for r in done if r["chip"] == chip][::-1]
        for y, row in enumerate(rows):
            label = (lambda text: text) if y == 0 else (lambda text: None)
            axis.barh(
                y + 0.2,
                row.get("xla_token_head") or 0,
                0.36,
                color="#c9c9c9",
                label=label("XLA form (estimated cycles)"),
            )
            axis.barh(y - 0.2, row["bundles_token_head"], 0.36, color="#2f6fab", label=label("Pallas (static bundles)"))
            floor = row["hbm_cycles_token_head"]
            axis.plot([floor, floor], [y - 0.4, y + 0.4], color="#d1495b", label=label("HBM"))
        axis.set_yticks(range(len(rows)), [r["case"] for r in rows])
        axis.set_xscale("log")
        axis.set_title(chip)
        axis.set_xlabel("per token and head")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    beside = path.with_suffix(".partial.png")
    figure.savefig(beside, dpi=120)
    plt.close(figure)
    beside.rename(path)
