"""The surface that a view is drawn on: how wide, painted or not, which characters it can show."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

_Node = TypeVar("_Node")


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Name the drawing characters of a view."""

    dot: str
    arrow: str
    bar: str
    yes: str
    no: str
    branch: str
    corner: str
    trunk: str


_UNICODE = Glyphs("·", "→", "█", "✓", "✗", "├─ ", "└─ ", "│  ")
_ASCII = Glyphs("-", "->", "#", "+", "x", "|- ", "`- ", "|  ")
_COLORS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_ANSI = {"bold": "1", "dim": "2", **_COLORS, **{f"bold {name}": f"1;{code}" for name, code in _COLORS.items()}}


@dataclass(frozen=True, slots=True)
class Canvas:
    """Draw at ``width`` cells; ``color`` paints with ANSI escapes, ``unicode`` allows more than ASCII."""

    width: int
    color: bool
    unicode: bool = True

    @property
    def glyphs(self) -> Glyphs:
        """Give the drawing characters that can be shown."""
        return _UNICODE if self.unicode else _ASCII

    def branches(self, nodes: Sequence[_Node], below: str) -> Iterator[tuple[_Node, str, str]]:
        """Hang nodes below one of a tree: each with what is drawn before its name, and before what lies below it."""
        glyphs = self.glyphs
        for node in nodes:
            joint, trunk = (glyphs.corner, "   ") if node is nodes[-1] else (glyphs.branch, glyphs.trunk)
            yield node, below + joint, below + trunk

    def draw(self, content: RenderableType) -> str:
        """Render rich content to text."""
        from rich.console import Console

        console = Console(
            file=io.StringIO(),
            width=self.width,
            height=25,  # without one, rich takes every dumb terminal for 80 cells wide
            force_terminal=True,
            # Sixteen colours are enough, and the terminal's own theme decides what they look like.
            color_system="standard" if self.color else None,
            no_color=False,
            force_jupyter=False,
            markup=False,
            emoji=False,
            highlight=False,
        )
        with console.capture() as capture:
            console.print(content)
        # Rich fills every line up with blanks, which would be copied along.
        return "".join([f"{line.rstrip()}\n" for line in capture.get().splitlines()])

    def paint(self, text: str, style: str) -> str:
        """Paint one piece of a long list by hand: rich would take half a millisecond for every line."""
        return f"\x1b[{_ANSI[style]}m{text}\x1b[0m" if self.color and style else text
