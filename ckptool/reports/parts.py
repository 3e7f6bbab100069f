"""The parts that every view is made of: foreign text, items in a row, titled sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from ckptool.reports.canvas import Canvas
from ckptool.reports.text import safe_text, shorten

LONGEST = 160  # characters of one foreign text; what is longer shows both ends, its length and a checksum
MAX_SHOWN = 6  # items of one list; the line after them says how many more there are and what shows all
TITLE_WIDTH = 10  # of the column of section titles, with its padding
_BAR_WIDTH = 60

Lines = Iterator[Text]


def foreign(text: str, style: str = "", width: int = LONGEST) -> Text:
    """Show text out of a file; never as markup."""
    return Text(safe_text(shorten(text, width)), style)


def line(*parts: str | Text | tuple[str, str]) -> Text:
    """Put pieces side by side, each in its own style (rich's ``+`` spreads the style of the first)."""
    return Text.assemble(*parts)


def flow(parts: Iterable[str | Text], canvas: Canvas, mark: str | None = None) -> Text:
    """Put items side by side with a mark between them; a line that is full breaks between two items."""
    between = f" {canvas.glyphs.dot} " if mark is None else mark
    flowing, width = Text(), 0
    for part in parts:
        item = part if isinstance(part, Text) else Text(part)
        if width and width + len(between) + item.cell_len > canvas.width - TITLE_WIDTH:
            flowing.append("\n")
            width = 0
        elif width:
            flowing.append(between, "dim")
            width += len(between)
        flowing.append_text(item)
        width += item.cell_len
    return flowing


def stacked_bar(shares: Sequence[tuple[str, int, str]], canvas: Canvas) -> Text:
    """Draw shares side by side in one bar: the mark, size and style of each; the smallest has a cell."""
    total = sum(size for _, size, _ in shares)
    room = max(min(canvas.width - TITLE_WIDTH - len(shares), _BAR_WIDTH), 10)
    return Text.assemble(*((mark * max(round(room * size / total), 1), style) for mark, size, style in shares))


def say_rest(count: int, where: str) -> Lines:
    """Say what a list leaves out, if anything."""
    if count > 0:
        yield Text(f"... and {count:,} more: {where} shows all", "dim")


def section_grid(sections: Iterable[tuple[str, Iterable[Text]]]) -> Table:
    """Make the grid of a view: titles on the left, lines on the right; a section without lines is left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold cyan", no_wrap=True, min_width=TITLE_WIDTH - 2)
    grid.add_column(overflow="fold")
    for title, drawn in sections:
        lines = list(drawn)
        if lines:
            grid.add_row(Text(title), Text("\n").join(lines))
    return grid
