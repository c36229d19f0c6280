"""The parsers of the commands: values checked when the command line is read, help with defaults, errors in one line.

parser.add_argument("--rows", type=integer(minimum=1), default=16, help="...")
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from hybrid_jax.checks import check_integer, check_number
from hybrid_jax.files import find_shipped
from hybrid_jax.iterations import Iterations, read_iterations


def _checked(convert: Callable[[str], Any], check: Callable, bounds: dict) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text
        try:
            return check("it", value, **bounds)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e).removeprefix("it ")) from None

    return read


def integer(**bounds: int) -> Callable[[str], int]:
    """Returns a function that reads an option's integer; bounds as `check_integer` takes them."""
    return _checked(int, check_integer, bounds)


def number(**bounds: float) -> Callable[[str], float]:
    """Returns a function that reads an option's finite number; bounds as `check_number` takes them."""
    return _checked(float, check_number, bounds)


OVERRIDES = "Fields of the config are overridden by --config.a.b=VALUE, e.g. --config.phases.align.steps=200 --config.mesh.fsdp=2."


def directory(text: str) -> str:
    """Reads the directory of a model or a run; those that come with the package (`launch/tiny_qwen3`) are found from everywhere."""
    return str(find_shipped(text))


def iterations(text: str) -> Iterations:
    """Reads iterations of Gated KalmaNet: `8`, or `3:8,5:4` by layer."""
    try:
        return read_iterations("it", text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e).removeprefix("it ")) from None


def add_gka_iterations(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Adds `--gka-iterations`, which every command has that decodes with a given model or measures it.

    Args:
      of: of which models they are, for the help; by default the command's only one.
    """
    parser.add_argument(
        "--gka-iterations",
        type=iterations,
        metavar="N|LAYER:N,...",
        help=f"iterations of Gated KalmaNet{of}, in all layers with it (8) or in those that are named (3:8,5:4), counted as "
        "gka_config.num_iter counts them; fewer are faster and less exact, 0 leaves the solve out; default: as in config.json",
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows the default of each option that has one, and leaves the lines of examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default in ("", (), [])
        return action.help if absent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and end the process with code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists the options\n")

    def refuse(self, unknown: Iterable[str]) -> NoReturn:
        """Ends the process with an error that names unknown options, and which known one may be meant."""
        unknown, known = list(unknown), [name for action in self._actions for name in action.option_strings if name != "--help"]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else "" if OVERRIDES not in (self.description or "") else f"; {OVERRIDES[:-1]}"
        self.error(f"{'unknown options' if len(unknown) > 1 else 'unknown option'} {' '.join(unknown)}{hint}")
