"""What a mixer costs on a TPU beside its kernels: `python -m hybrid_jax.plan.layers [MIXER …] [--chip v5e …] [--lines 10]`.

The input norm and the mixer of one layer of a public model are compiled for chips that the machine does not have, forward or
forward and backward, and what the compiler wrote is added up: matrix products, Pallas kernels, and the XLA operations between
them, by source line. Nothing runs on a TPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from hybrid_jax.checks import check_integer
from hybrid_jax.families.public import PUBLIC
from hybrid_jax.plan.layer_program import config_of_layer
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.compile import DUMPED, worker
from kernels_pallas.recorded import recorded, without_out

MIXERS = ("*", "GDN", "GKA", "GKA:solver=cg", "M2", "M3")
LEGEND = """Cycles per token and head of one device. matmul: the matrix units at their peak (estimate: the compiler's); kernels: the
larger of static bundles and HBM traffic; glue: HBM traffic of all other XLA operations (estimate: the compiler's), which is what
bounds them; bound: the sum of the three. Waits, and copies that run beside other operations, are not in it."""


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The costs of a mixer with its input norm, in cycles per token and head of one device.

    Args:
      mixer: its symbol in a pattern.
      matmul_floor: of the matrix products, at the matrix units' peak.
      matmul_estimate, glue_estimate: the compiler's estimates.
      matmul_hbm, glue_hbm: HBM traffic of the products' operations, and of the XLA operations that are neither products nor
        kernels, at the published bandwidth.
      prefetch_hbm: traffic of the copies that run beside other operations.
      kernels: (static bundles, HBM traffic) by kernel; 0 bundles: another library's kernel, whose grid is not known.
      lines: (estimate, HBM traffic) of the XLA operations by source line.
    """

    mixer: str
    matmul_floor: float
    matmul_estimate: float
    matmul_hbm: float
    glue_estimate: float
    glue_hbm: float
    prefetch_hbm: float
    kernels: Mapping[str, Sequence[float]]
    lines: Mapping[str, Sequence[float]]

    @property
    def kernel_bound(self) -> float:
        """The kernels one after the other, each bound by its bundles or by HBM."""
        return sum(max(pair) for pair in self.kernels.values())

    @property
    def bound(self) -> float:
        """What the mixer takes at least: matrix products at their peak, then kernels, then the other operations' HBM traffic."""
        return self.matmul_floor + self.kernel_bound + self.glue_hbm


def layer_costs(chip: str, mixers: Sequence[str], model: str, seq_len: int, backward: bool) -> Iterator[LayerCost]:
    """Compiles mixers and yields their costs, each as it is ready.

    Args:
      chip: a name in `kernels_pallas.lab.CHIPS`.
      mixers: symbols of a pattern, each with options of its mixer if wanted (`layer_program.config_of_layer`).
      model: a name in `PUBLIC`.
      seq_len: tokens of the row.
      backward: whether gradients of the input and of the mixer's parameters are computed too.

    Raises:
      ValueError: an unknown symbol or option, fewer than 1 token, or a mixer that does not compile; has the compiler's message.
      RuntimeError: the compiling process died; has the end of its standard error.
    """
    check_integer("seq_len", seq_len, minimum=1)
    for mixer in mixers:
        config_of_layer(model, mixer)
    with contextlib.ExitStack() as stack:
        dump = stack.enter_context(tempfile.TemporaryDirectory())
        request = dict(chip=chip, mixers=list(mixers), model=model, seq_len=seq_len, backward=backward, dump=dump)
        options = f"--xla_jf_dump_to={dump} {DUMPED}"
        for result in worker(stack, "hybrid_jax.plan.layer_program", request, options, len(mixers)):
            if "error" in result:
                raise ValueError(f"{result['mixer']} does not compile for {chip} at {seq_len} tokens: {result['error']}")
            yield LayerCost(**result)


def print_cost(chip: str, cost: LayerCost, lines: int, width: int = 6) -> None:
    """Prints a row of the table, its first column `width` characters wide.

    Below it come the mixer's kernels and the `lines` source lines with the most estimated cycles, if `lines` is not 0.
    """
    numbers = (cost.bound, cost.matmul_floor, cost.matmul_estimate, cost.kernel_bound, cost.glue_hbm, cost.glue_estimate)
    print(f"{cost.mixer:{width}} {chip:6}" + "".join(f"{number:10.1f}" for number in numbers), flush=True)
    if not lines:
        return
    for name, (bundles, hbm) in cost.kernels.items():
        print(f"    kernel {name:42} bundles {bundles:6.2f}  HBM {hbm:6.2f}")
    for line, (estimate, hbm) in sorted(cost.lines.items(), key=lambda item: -item[1][0])[:lines]:
        print(f"    glue   {line or '(the compiler)':60} estimate {estimate:6.2f}  HBM {hbm:6.2f}")


def draw(costs: Mapping[str, Sequence[LayerCost]], path: pathlib.Path) -> None:
    """Draws a stacked bar for every mixer and chip: products, kernels, glue, and the compiler's estimate of all XLA operations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(costs), figsize=(1.5 + 3.2 * len(costs), 3.4), squeeze=False)
    for axis, (chip, found) in zip(axes[0], costs.items(), strict=True):
        for x, cost in enumerate(found):
            bottom = 0.0
            parts = (("matmul", cost.matmul_floor), ("kernels", cost.kernel_bound), ("other operations (HBM)", cost.glue_hbm))
            for (label, height), color in zip(parts, ("#2f6fab", "#e3a72f", "#d1495b"), strict=True):
                axis.bar(x, height, 0.6, bottom, color=color, label=label if x == 0 else None)
                bottom += height
            estimate = cost.matmul_estimate + cost.kernel_bound + cost.glue_estimate
            axis.plot(
                [x - 0.35, x + 0.35], [estimate] * 2, color="black", label="with the compiler's estimates" if x == 0 else None
            )
        axis.set_xticks(
            range(len(found)), ["attention" if c.mixer == "*" else c.mixer.replace(":", "\n") for c in found], fontsize=8
        )
        axis.set_title(chip)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("cycles per token and head")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    beside = path.with_suffix(".partial.png")
    figure.savefig(beside, dpi=120)
    plt.close(figure)
    beside.rename(path)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_jax.plan.layers", description=(__doc__ or "").split(": ")[0])
    parser.add_argument("mixer", nargs="*", default=list(MIXERS), help=f"e.g. GKA or GKA:solver=cg (default: {' '.join(MIXERS)})")
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=["v5e"])
    parser.add_argument("--model", default="Qwen/Qwen3-8B", choices=PUBLIC, metavar="NAME", help="a public model")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--forward", action="store_true", help="without the backward pass")
    parser.add_argument("--lines", type=int, default=0, help="how many source lines are shown of each mixer")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE.png")
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print('the laboratory needs the TPU compiler: pip install "jax[tpu]" (it compiles on any x86-64 Linux)', file=sys.stderr)
        return 2
    costs: dict[str, list[LayerCost]] = {}
    try:
        with recorded(options.out, "hybrid_jax.plan.layers", without_out(sys.argv[1:])):
            passes = "forward" if options.forward else "forward and backward"
            print(f"{options.model}, {passes}, {options.seq_len:,} tokens, bfloat16")
            heads = ("bound", "matmul", "estimate", "kernels", "glue", "estimate")
            width = max(6, *map(len, options.mixer))
            print(f"{'mixer':{width}} {'chip':6}" + "".join(f"{head:>10}" for head in heads))
            for chip in options.chip:
                for cost in layer_costs(chip, options.mixer, options.model, options.seq_len, not options.forward):
                    costs.setdefault(chip, []).append(cost)
                    print_cost(chip, cost, options.lines, width)
            print(LEGEND)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.picture:
        draw(costs, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
