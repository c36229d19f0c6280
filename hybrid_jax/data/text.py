"""Bytes to text: UTF-8, and a clear refusal or a count for everything else."""

from __future__ import annotations

import codecs

REPLACEMENT = "\ufffd"
ADVICE = "convert it to UTF-8, or prepare the source with --skip-bad or --replace-invalid"


def decode(data: bytes, replace: bool = False) -> tuple[str, int]:
    """Decodes UTF-8 and counts the characters that replace bytes which are not UTF-8.

    Args:
      data: the bytes; a byte-order mark at the beginning is removed.
      replace: put U+FFFD in place of such bytes, instead of refusing them.

    Raises:
      ValueError: the bytes are not UTF-8 (and `replace` is off), or hold null bytes, as binary files and UTF-16 do.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise ValueError(f"not text: it has null bytes (at offset {data.index(0)}), as binary files and UTF-16 have")
    try:
        return data.decode(), 0
    except UnicodeDecodeError as e:
        if not replace:
            raise ValueError(f"not UTF-8 (byte 0x{data[e.start]:02x} at offset {e.start}): {ADVICE}") from None
    text = data.decode(errors="replace")
    return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())


def check_text(text: str) -> str:
    """Returns the text if it can be written as UTF-8.

    Raises:
      ValueError: the text has half of a surrogate pair (JSON's "\\ud800" gives one).
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"the text has half of a surrogate pair (U+{ord(text[e.start]):04X}), which is no character") from None
    return text
