"""Text that is safe to show: foreign strings escaped, sizes and counts for people, tab-separated lines for programs."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Blank or invisible, yet printable to Unicode: joiners, fillers, variation selectors, the empty braille pattern.
_INVISIBLE = (
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef"  # variation selectors supplement
)
# A backslash that looks like the start of an escape is escaped too: two different names never look the same.
_SUSPECT = re.compile(rf"[^ -~]|\\(?=[xuU])|[{_INVISIBLE}]")
_ALWAYS_HIDDEN = re.compile(f"[{_INVISIBLE}]")

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


def safe_text(text: str) -> str:
    r"""Escape everything that could move a cursor, hide or reorder text, or start a line: as ``\xNN`` or ``\uNNNN``.

    Letters of every script stay. What Python does not call printable goes: control characters, surrogates,
    direction marks, zero-width characters, line separators, private and unassigned code points.
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return _SUSPECT.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character != "\\" and character.isprintable() and not _ALWAYS_HIDDEN.match(character):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is too wide: both ends, the length and a checksum stay, so that no two such
    texts look the same.
    """
    if len(text) <= width:
        return text
    checksum = binascii.crc32(text.encode("utf-8", "surrogatepass"))
    # Dots of ASCII: where a terminal cannot show more, an escape would be wider than the room that is left.
    mark = f"...[{len(text):,} characters, {checksum:08x}]..."
    room = max(width - len(mark), 2)
    return text[: room - room // 2] + mark + text[len(text) - room // 2 :]


def size_text(nbytes: int) -> str:
    """Write a size in bytes with decimal units, as disks and ``rich.filesize.decimal`` count."""
    if nbytes < 1000:
        return "1 byte" if nbytes == 1 else f"{nbytes:,} bytes"
    step = min((len(str(nbytes)) - 1) // 3, len(_UNITS))
    return f"{nbytes / 1000**step:,.1f} {_UNITS[step - 1]}"


def count_text(count: int) -> str:
    """Write a large count with a decimal letter (``11.2 M``), a small one exactly."""
    if count < 10_000:
        return f"{count:,}"
    for letter, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= unit:
            return f"{count / unit:,.1f} {letter}"
    return f"{count / 1000:,.1f} k"


def file_names(paths: Sequence[str]) -> list[str]:
    """Name files by their last part, or in full where that is the same for two; the text is not yet safe to show."""
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def plural(count: int, noun: str) -> str:
    """Count a noun (``1 tensor``, ``2 tensors``)."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shape_text(shape: Iterable[int] | None) -> str:
    """Write a shape as ``64x3x7x7``; ``scalar`` without dimensions, ``?`` where it is not known."""
    if shape is None:
        return "?"
    return "x".join(map(str, shape)) or "scalar"


def row(*cells: Any) -> str:
    """Join one plain line: tabs between the cells, None as nothing, foreign characters escaped."""
    return "\t".join(["" if cell is None else safe_text(str(cell)) for cell in cells])
