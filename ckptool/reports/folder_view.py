"""Many checkpoints side by side, for a person at a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from ckptool.model.folder import FileRow, Ranking, Table
from ckptool.model.training import Fact
from ckptool.reports.canvas import Canvas
from ckptool.reports.phrases import value_phrase
from ckptool.reports.text import plural, safe_text, shorten, size_text

_LONGEST = 160  # characters of one name or reason
_LONGEST_VALUE = 24
_MAX_METRICS = 12
_MARK_WIDTH = 3
_NARROWEST_NAME = 16
_WIDEST_SHARE = 0.7  # of a line, for a name beside cells
_GAP = 2
_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class _Column:
    """Hold one column: its title, its cells, how much it is worth where there is not room for all."""

    title: str
    cells: tuple[str, ...]
    worth: int
    side: str = ">"

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.title, *self.cells)))


def view_table(table: Table, folder: Path | None, canvas: Canvas) -> str:
    """Draw the table, the best first and marked; names stand without the ``folder`` that they are all in."""
    ranking = table.ranking
    rows = [row for row in ranking.rows if not row.error]
    parts = [canvas.draw(_head(table, folder, canvas))]
    if rows:
        parts.append("".join([f"{line}\n" for line in _body(rows, ranking, folder, canvas)]))
    warnings = [*_dangerous(ranking.rows, folder), *_unreadable(ranking.rows, folder)]
    if warnings:
        parts.append(canvas.draw(_remarks([(Text(canvas.glyphs.no, "red"), warning) for warning in warnings])))
    parts.append(canvas.draw(_remarks([_verdict(ranking, folder)])))
    return "\n".join(parts)


def _remarks(lines: Sequence[tuple[Text, Text]]) -> RichTable:
    """Put a mark before each paragraph."""
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for mark, text in lines:
        grid.add_row(mark, text)
    return grid


def _head(table: Table, folder: Path | None, canvas: Canvas) -> Text:
    rows = table.ranking.rows
    unreadable = sum(1 for row in rows if row.error)
    parts = [Text(plural(len(rows), "checkpoint")), *map(Text, _kinds(rows))]
    if unreadable:
        parts.append(Text(f"{unreadable:,} unreadable", "red"))
    if table.skipped:
        kinds = ", ".join(f"{count:,} {safe_text(kind)}" for kind, count in sorted(table.skipped.items()))
        parts.append(Text(f"skipped: {kinds}"))
    title = [Text(safe_text(shorten(str(folder), _LONGEST)), "bold")] if folder is not None else []
    return Text(f" {canvas.glyphs.dot} ").join([*title, *parts])


def _kinds(rows: Sequence[FileRow]) -> list[str]:
    """Give the kind that all rows have in common, if they do; else a column tells."""
    kinds = {row.kind for row in rows if not row.error}
    return [safe_text(kind) for kind in kinds] if len(kinds) == 1 else []


def _body(rows: Sequence[FileRow], ranking: Ranking, folder: Path | None, canvas: Canvas) -> Iterator[str]:
    names = [_name(row, folder) for row in rows]
    columns = _columns(rows, ranking)
    kept = _fitting(columns, names, canvas.width)
    room = max(canvas.width - _MARK_WIDTH - sum(column.width + _GAP for column in kept), _NARROWEST_NAME)
    width = max([cell_len(name) for name in ("file", *names) if cell_len(name) <= room])
    titles = _padded("file", width) + _tail([column.title for column in kept], kept)
    yield canvas.paint(" " * _MARK_WIDTH + titles, "bold")
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        tail = _tail([column.cells[index] for column in kept], kept)
        style = "bold green" if row is ranking.best else "" if index < ranking.ranked else "dim"
        mark = f"{canvas.glyphs.arrow if row is ranking.best else '':{_MARK_WIDTH}}"
        yield from (canvas.paint(line, style) for line in _row_lines(mark, name, tail, width))
    yield from (canvas.paint(line, "dim") for line in _left_out(columns, kept, rows, canvas))


def _row_lines(mark: str, name: str, tail: str, width: int) -> Iterator[str]:
    """Give a name that is too wide a line of its own."""
    if cell_len(name) > width:
        yield mark + name
        mark, name = " " * _MARK_WIDTH, ""
    yield (mark + _padded(name, width) + tail).rstrip()


def _left_out(
    columns: Sequence[_Column], kept: Sequence[_Column], rows: Sequence[FileRow], canvas: Canvas
) -> list[str]:
    titles = [column.title for column in columns if column not in kept]
    further = len({name for row in rows for name in row.metrics}) - _MAX_METRICS
    if further > 0:
        titles.append(f"{further:,} metrics more")
    return textwrap.wrap(f"no room for {', '.join(titles)}: see --json", canvas.width) if titles else []


def _fitting(columns: Sequence[_Column], names: Sequence[str], width: int) -> list[_Column]:
    """Leave out the columns worth least until the names have room; a name wider than most need not be thought of."""
    widest = max([cells for cells in map(cell_len, ("file", *names)) if cells <= _WIDEST_SHARE * width])
    kept = list(columns)
    while _MARK_WIDTH + widest + sum(column.width + _GAP for column in kept) > width:
        least = min(range(len(kept)), key=lambda index: kept[index].worth, default=None)
        if least is None or kept[least].worth == _ALWAYS:
            break
        del kept[least]
    return kept


_ALWAYS = 9


def _columns(rows: Sequence[FileRow], ranking: Ranking) -> list[_Column]:
    """Make the columns that tell something here."""
    ranked = [] if ranking.metric is None else [ranking.metric.value]
    others = [name for name in dict.fromkeys(name for row in rows for name in row.metrics) if name not in ranked]
    columns = [
        _Column("kind", tuple([safe_text(row.kind) for row in rows]), 4, "<"),
        _Column("epoch", _facts([row.epoch for row in rows]), 8),
        _Column("step", _facts([row.global_step for row in rows]), 7),
        *(_metric(name, rows, _ALWAYS) for name in ranked),
        *(_metric(name, rows, 1 if name.startswith("best_") else 2) for name in others[: _MAX_METRICS - len(ranked)]),
        _Column("size", tuple([size_text(row.nbytes or 0) for row in rows]), 6),
        _Column("changed", tuple([_local_time(row.modified) for row in rows]), 5, "<"),
    ]
    return [column for column in columns if set(column.cells) != {_UNKNOWN} and not _is_common_kind(column)]


def _is_common_kind(column: _Column) -> bool:
    return column.title == "kind" and len(set(column.cells)) == 1


def _metric(name: str, rows: Sequence[FileRow], worth: int) -> _Column:
    return _Column(safe_text(shorten(name, _LONGEST_VALUE)), _facts([row.metrics.get(name) for row in rows]), worth)


def _facts(facts: Sequence[Fact | None]) -> tuple[str, ...]:
    return tuple(
        [_UNKNOWN if fact is None else safe_text(shorten(value_phrase(fact.value), _LONGEST_VALUE)) for fact in facts]
    )


def _local_time(seconds: float | None) -> str:
    try:
        time = datetime.fromtimestamp(int(seconds or 0), timezone.utc).astimezone()
    except (OverflowError, ValueError, OSError):
        return _UNKNOWN
    return _UNKNOWN if seconds is None else time.strftime("%Y-%m-%d %H:%M")


def _name(row: FileRow, folder: Path | None) -> str:
    path = Path(row.path)
    shown = path.relative_to(folder) if folder is not None and folder in (path, *path.parents) else path
    return safe_text(shorten(str(shown), _LONGEST))


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _tail(cells: Sequence[str], columns: Sequence[_Column]) -> str:
    parts = [
        " " * (column.width - cell_len(cell)) + cell if column.side == ">" else _padded(cell, column.width)
        for cell, column in zip(cells, columns, strict=True)
    ]
    return "".join([" " * _GAP + part for part in parts])


def _dangerous(rows: Sequence[FileRow], folder: Path | None) -> Iterator[Text]:
    for row in rows:
        if row.verdict == "dangerous":
            yield _warning(row, folder, "dangerous: it can run commands where it is loaded without weights_only")


def _unreadable(rows: Sequence[FileRow], folder: Path | None) -> Iterator[Text]:
    for row in rows:
        if row.error:
            reason = row.error.removeprefix(f"{row.path}: ")
            yield _warning(row, folder, safe_text(shorten(reason, 2 * _LONGEST)))


def _warning(row: FileRow, folder: Path | None, reason: str) -> Text:
    return Text.assemble((_name(row, folder), "red"), "  ", reason)


def _verdict(ranking: Ranking, folder: Path | None) -> tuple[Text, Text]:
    if ranking.best is None:
        return Text("no best", "yellow"), Text(safe_text(ranking.refusal))
    name = (_name(ranking.best, folder), "bold green")
    return Text("best", "bold cyan"), Text.assemble(name, "  ", safe_text(ranking.reason))
