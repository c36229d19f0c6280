"""`python -m kernels_pallas.lab [CASE ...] [--chip v5e v5p v6e tpu7x]`: see the package's docstring."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys

from kernels_pallas.lab.cases import CASES, Shape
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.compile import compile_cases
from kernels_pallas.lab.lab_report import draw, print_table, write_json
from kernels_pallas.recorded import recorded, without_out


def choose(names: list[str]) -> list[str]:
    """Returns the cases named on the command line: a case's name, or an operation's name for all of its cases.

    Raises:
      ValueError: a name is neither.
    """
    if not names:
        return list(CASES)
    chosen = []
    for name in names:
        found = [name] if "." in name and name in CASES else [c for c in CASES if c.split(".")[0] == name]
        if not found:
            raise ValueError(f"no case {name!r}; have {', '.join(CASES)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.lab", description=(__doc__ or "").split(": ")[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)} (default: all; decode steps at batch 64)")
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/lab"), help="folder for lab.json and lab.png")
    parser.add_argument("--record", metavar="FILE", help="write the table to this file, with versions and machine")
    parser.add_argument("--no-xla", action="store_true", help="do not compile the XLA form beside each kernel")
    for field, default in Shape()._asdict().items():
        option = "--" + field.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(default), default=None, help=f"default {default}")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        print('the laboratory needs the TPU compiler: pip install "jax[tpu]" (it compiles on any x86-64 Linux)', file=sys.stderr)
        return 2
    try:
        cases = choose(options.case)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    asked = {f: getattr(options, f) for f in Shape._fields if getattr(options, f) not in (None, False)}
    groups = {False: [c for c in cases if not CASES[c].decode], True: [c for c in cases if CASES[c].decode]}
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for chip in options.chip:
        for decode, names in groups.items():
            shape = {"batch": 64} | asked if decode else asked
            for result in compile_cases(chip, names, shape, xla=not options.no_xla) if names else ():
                results.append(result)
                print(f"{result['chip']} {result['case']}: {'failed' if 'error' in result else 'compiled'}", file=sys.stderr)
                write_json(results, options.out / "lab.json")
    arguments = sys.argv[1:] if argv is None else argv
    with recorded(options.record, "kernels_pallas.lab", without_out(arguments, "--out", "--record")):
        print_table(results)
    draw(results, options.out / "lab.png")
    print(f"{options.out / 'lab.json'}, {options.out / 'lab.png'}")
    return 1 if any("error" in r for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
