"""A page as a list of blocks, written as Markdown or as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import html
import pathlib
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading; `level` 1 is the page's."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines that are shown as they are."""

    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file beside the page."""

    path: pathlib.Path
    description: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text.

    Args:
      code: columns whose cells are code, so that a `*` in them is no emphasis.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    code: tuple[int, ...] = ()

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        marked = [[f"`{c}`" if n in self.code and c else _plain(c) for n, c in enumerate(row)] for row in self.rows]
        header = [_plain(c) for c in self.header]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *marked))

    def html(self) -> str:
        """Returns the table in HTML."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

        escaped = [
            [f"<code>{html.escape(c)}</code>" if n in self.code else html.escape(c) for n, c in enumerate(row)] for row in self.rows
        ]
        head = line([html.escape(c) for c in self.header], "th")
        return "\n".join(["<table>", head, *(line(cells, "td") for cells in escaped), "</table>"])

    def latex(self) -> str:
        """Returns the table in LaTeX; it needs the package booktabs."""
        lines = [" & ".join(map(_latex, cells)) + r" \\" for cells in (self.header, *self.rows)]
        columns = "l" * len(self.header)
        parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([*parts, r"\end{tabular}"]) + "\n"


Block = Heading | Text | Code | Picture | Table
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "–": "--", "*": r"$*$"},
    "[": "{[}",  # at the beginning of a line it would be an option of the line break before it
}
_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;margin:1em 0}"
    "th,td{border:1px solid #ccc;padding:.3em .6em;text-align:left}th{background:#f2f2f2}img{max-width:100%}"
    "pre{background:#f2f2f2;padding:1em;overflow-x:auto}"
)


def _latex(text: str) -> str:
    """Returns text with LaTeX's special characters written out."""
    return "".join(_LATEX.get(c, c) for c in text)


def _plain(text: str) -> str:
    """Returns text for Markdown in which no character is a mark; a `_` inside a word is none."""
    return re.sub(r"[\\`*<&\[\]|$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def as_markdown(blocks: Sequence[Block]) -> str:
    """Returns a page in Markdown; pictures are links to the files beside it."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Code(text):
            fence = "`" * max(3, *(1 + len(run) for run in re.findall("`+", text)), 0)
            return f"{fence}\n{text}\n{fence}"
        case Picture(path, description):
            return f"![{_plain(description)}]({path.name})"
        case Table():
            return block.markdown()


def as_html(blocks: Sequence[Block]) -> str:
    """Returns a page as one HTML file with its pictures inside, which needs no other file and no network."""
    title = next((html.escape(b.text) for b in blocks if isinstance(b, Heading)), "")
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
    return "\n".join([head, "<body>", *map(_html, blocks), "</body></html>"]) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(path, description):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'
        case Table():
            return block.html()
