"""Aligned columns for a terminal: those worth least give way where there is not room for all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from ckptool.reports.canvas import Canvas

ALWAYS = 9  # the worth of a column that never gives way
_NARROWEST_NAME = 16
_WIDEST_SHARE = 0.7  # of a line, for a name beside cells
_GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """Hold one column: its title, its cells, how much it is worth where there is not room for all.

    ``style`` paints the cells of rows that have no style of their own.
    """

    title: str
    cells: tuple[str, ...]
    worth: int = ALWAYS
    side: str = ">"
    style: str = ""

    @property
    def width(self) -> int:
        """Give the cells of a terminal that it takes."""
        return max(map(cell_len, (self.title, *self.cells)))


@dataclass(frozen=True, slots=True)
class Row:
    """Name one row; ``mark`` stands before the name, ``style`` paints all of it."""

    name: str
    mark: str = ""
    style: str = ""


def table_lines(
    title: str, rows: Sequence[Row], columns: Sequence[Column], canvas: Canvas, further: Sequence[str] = ()
) -> Iterator[str]:
    """Yield a line of titles, the rows, and what was left out: columns without room, and what ``further`` names.

    A name that is too wide gets a line of its own.
    """
    indent = max(len(row.mark) for row in rows)
    kept = _fitting(columns, [title, *(row.name for row in rows)], canvas.width - indent)
    room = max(canvas.width - indent - sum(column.width + _GAP for column in kept), _NARROWEST_NAME)
    width = max([cell_len(name) for name in (title, *(row.name for row in rows)) if cell_len(name) <= room])
    titles = "".join([_cell(column, column.title) for column in kept])
    yield canvas.paint(" " * indent + padded(title, width) + titles, "bold")
    for index, row in enumerate(rows):
        yield from _row_lines(row, indent, width, kept, index, canvas)
    left_out = [*(column.title for column in columns if column not in kept), *further]
    if left_out:
        text = f"no room for {', '.join(left_out)}: see --json"
        yield from (canvas.paint(line, "dim") for line in textwrap.wrap(text, canvas.width))


def _row_lines(row: Row, indent: int, width: int, kept: Sequence[Column], index: int, canvas: Canvas) -> Iterator[str]:
    own = [_cell(column, column.cells[index]) for column in kept]
    mark, name = f"{row.mark:{indent}}", row.name
    if cell_len(name) > width:
        yield canvas.paint(mark + name, row.style)
        mark, name = " " * indent, ""
    start = mark + padded(name, width)
    if row.style:
        yield canvas.paint("".join((start, *own)).rstrip(), row.style)
    else:
        yield (
            start + "".join([canvas.paint(cell, column.style) for cell, column in zip(own, kept, strict=True)]).rstrip()
        )


def _cell(column: Column, text: str) -> str:
    blank = " " * (column.width - cell_len(text))
    return " " * _GAP + (blank + text if column.side == ">" else text + blank)


def padded(text: str, width: int) -> str:
    """Fill a text up to a width in cells of a terminal."""
    return text + " " * (width - cell_len(text))


def wrap_items(items: Sequence[str], between: str, width: int) -> list[str]:
    """Write items one after the other; a line that is full breaks between two of them only."""
    lines = [""]
    for item in items:
        if lines[-1] and cell_len(lines[-1]) + cell_len(item) + len(between) > width:
            lines[-1] += between.rstrip()
            lines.append("")
        lines[-1] += (between if lines[-1] else "") + item
    return lines


def _fitting(columns: Sequence[Column], names: Sequence[str], width: int) -> list[Column]:
    """Leave out the columns worth least until the names have room; a name wider than most need not be thought of."""
    widest = max([cells for cells in map(cell_len, names) if cells <= _WIDEST_SHARE * width], default=0)
    kept = list(columns)
    while widest + sum(column.width + _GAP for column in kept) > width:
        least = min(range(len(kept)), key=lambda index: kept[index].worth, default=None)
        if least is None or kept[least].worth == ALWAYS:
            break
        del kept[least]
    return kept
