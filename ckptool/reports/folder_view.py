"""Many checkpoints side by side, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich.table import Table as RichTable
from rich.text import Text

from ckptool.model.folder import FileRow, Ranking, Table
from ckptool.model.training import Fact
from ckptool.reports.canvas import Canvas
from ckptool.reports.columns import ALWAYS, Column, Row, table_lines
from ckptool.reports.phrases import value_phrase
from ckptool.reports.text import plural, safe_text, shorten, size_text

_LONGEST = 160  # characters of one name or reason
_LONGEST_VALUE = 24
_MAX_METRICS = 12
_MARK_WIDTH = 3
_UNKNOWN = "-"


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
    listed = [
        Row(
            _name(row, folder),
            f"{canvas.glyphs.arrow if row is ranking.best else '':{_MARK_WIDTH}}",
            "bold green" if row is ranking.best else "" if index < ranking.ranked else "dim",
        )
        for index, row in enumerate(rows)
    ]
    further = len({name for row in rows for name in row.metrics}) - _MAX_METRICS
    more = [f"{further:,} metrics more"] if further > 0 else []
    return table_lines("file", listed, _columns(rows, ranking), canvas, more)


def _columns(rows: Sequence[FileRow], ranking: Ranking) -> list[Column]:
    """Make the columns that tell something here."""
    ranked = [] if ranking.metric is None else [ranking.metric.value]
    others = [name for name in dict.fromkeys(name for row in rows for name in row.metrics) if name not in ranked]
    columns = [
        Column("kind", tuple([safe_text(row.kind) for row in rows]), 4, "<"),
        Column("epoch", _facts([row.epoch for row in rows]), 8),
        Column("step", _facts([row.global_step for row in rows]), 7),
        *(_metric(name, rows, ALWAYS) for name in ranked),
        *(_metric(name, rows, 1 if name.startswith("best_") else 2) for name in others[: _MAX_METRICS - len(ranked)]),
        Column("size", tuple([size_text(row.nbytes or 0) for row in rows]), 6),
        Column("changed", tuple([_local_time(row.modified) for row in rows]), 5, "<"),
    ]
    return [column for column in columns if set(column.cells) != {_UNKNOWN} and not _is_common_kind(column)]


def _is_common_kind(column: Column) -> bool:
    return column.title == "kind" and len(set(column.cells)) == 1


def _metric(name: str, rows: Sequence[FileRow], worth: int) -> Column:
    return Column(safe_text(shorten(name, _LONGEST_VALUE)), _facts([row.metrics.get(name) for row in rows]), worth)


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
