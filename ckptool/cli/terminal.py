"""What the streams can take: a terminal or a pipe, colour or none, how wide."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from ckptool.errors import CkptoolError
from ckptool.reports.text import safe_text

if TYPE_CHECKING:
    from ckptool.reports.canvas import Canvas

_PIECE = 1 << 14


@dataclass(frozen=True, slots=True)
class Terminal:
    """Say how to present the answer: ``is_terminal`` chooses the view for people, ``color`` whether it is painted."""

    is_terminal: bool
    color: bool
    width: int
    quiet: bool = False


def detect(color: str, quiet: bool = False) -> Terminal:
    """Look at stdout and the environment (``NO_COLOR``, ``TERM=dumb``); ``color`` is auto, always or never.

    :raises CkptoolError: it is another word.
    """
    if color not in ("auto", "always", "never"):
        raise CkptoolError(f"--color {color}: choose one of auto, always, never")
    is_terminal = sys.stdout.isatty()
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    wanted = color == "always" or (color == "auto" and is_terminal and not plain)
    return Terminal(is_terminal or color == "always", wanted, max(shutil.get_terminal_size().columns, 40), quiet)


def canvas_of(terminal: Terminal) -> Canvas:
    """Make the surface to draw on: as wide as the terminal, with the characters that stdout can take."""
    from ckptool.reports.canvas import Canvas

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return Canvas(terminal.width, terminal.color, unicode)


def complain(message: str) -> None:
    """Write one refusal to stderr, as one line: a line break can only come out of a foreign name."""
    typer.echo("ckptool: " + safe_text(message), err=True)


def remark(message: str, terminal: Terminal) -> None:
    """Write one note to stderr, unless the user asked for quiet."""
    if not terminal.quiet:
        typer.echo("note: " + safe_text(message), err=True)


def show(text: str) -> None:
    """Write the answer to stdout; what the encoding cannot say is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding)
    # In pieces: of one large write to an unbuffered stream, Python forgets what the reader did not take.
    for start in range(0, len(shown), _PIECE):
        sys.stdout.write(shown[start : start + _PIECE])
