"""What verify found, for a person at a terminal: the verdict first, then what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ckptool.model.loading import LoadReport
from ckptool.model.verification import Check, Predictions, SideBySide, Verification
from ckptool.reports.canvas import Canvas
from ckptool.reports.parts import foreign
from ckptool.reports.text import file_names, plural, safe_text, shorten

_NAME_CELLS = 40
_TITLE_CELLS = 12  # the widest title of a section, and the gap behind it
_BAR_CELLS = 30
_MAX_CLASSES = 10
_MAX_NAMES = 6
_MAX_DIFFERING = 12

_VERDICTS = {
    "pass": ("bold green", "sound"),
    "fail": ("bold red", "not sound"),
    "inconclusive": ("bold yellow", "cannot be settled with these inputs"),
    "error": ("bold red", "could not be answered"),
}
# In the order in which they are shown: what matters most first.
_MARKS = {
    "fail": ("FAIL", "bold red"),
    "inconclusive": ("open", "bold yellow"),
    "warn": ("warn", "yellow"),
    "pass": ("ok", "green"),
    "skip": ("skip", "dim"),
}
_ALLOWED = ("allowed", "cyan")
_SERIOUS = frozenset(("fail", "inconclusive", "warn"))
_SHOWN_STATISTICS = ("mutual_information", "input_dependence", "share", "mean_confidence")
_AVERAGES = ("micro", "macro", "weighted")
_SHOWN_SPEED = {
    "avg_time_per_sample_ms": "mean ms per sample",
    "median_time_per_sample_ms": "median",
    "p95_time_per_sample_ms": "p95",
    "throughput_samples_per_sec": "samples per second",
    "batch_size": "batch",
    "peak_memory_bytes": "peak memory bytes",
}


def view_all(verifications: Sequence[Verification], beside: SideBySide | None, canvas: Canvas) -> str:
    """Draw all verifications that have something to show, then what sets them side by side."""
    text = "\n".join(view(verification, canvas) for verification in verifications if verification.checks)
    if beside is not None:
        text += "\n" + canvas.draw(_beside(beside, canvas))
    if len(verifications) > 1:
        text += "\n" + canvas.draw(_summary(verifications))
    return text


def view(verification: Verification, canvas: Canvas) -> str:
    """Draw one verification."""
    text = canvas.draw(_head(verification, canvas)) + canvas.draw(_checks(verification.checks))
    sections = list(_sections(verification, canvas))
    if not sections:
        return text
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for title, content in sections:
        grid.add_row(Text(title), content)
    return text + "\n" + canvas.draw(grid)


def _head(verification: Verification, canvas: Canvas) -> Panel:
    style, meaning = _VERDICTS[verification.verdict]
    marks = [_mark(check)[0] for check in verification.checks]
    order = (*(mark for mark, _ in _MARKS.values()), _ALLOWED[0])
    said = ", ".join(f"{marks.count(mark)} {mark.lower()}" for mark in order if mark in marks)
    line = Text.assemble((verification.verdict.upper(), style), f"  {meaning}", (f"  ({said})", "dim"))
    border = box.ROUNDED if canvas.unicode else box.ASCII
    title = foreign(verification.path, "bold", canvas.width - 8)
    return Panel(line, title=title, title_align="left", border_style=style.removeprefix("bold "), box=border)


def _mark(check: Check) -> tuple[str, str]:
    return _ALLOWED if check.allowed else _MARKS[check.status]


def _checks(checks: Sequence[Check]) -> Table:
    """List what is wrong first, each with what to do about it."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in sorted(checks, key=lambda check: list(_MARKS).index(check.status)):
        mark, style = _mark(check)
        serious = check.status in _SERIOUS
        message = Text(safe_text(check.message), "" if serious else "dim")
        if check.allowed:
            message.append(f"\nallowed because: {safe_text(check.allowed)}", "cyan")
        if check.advice and serious:
            message.append(f"\n{safe_text(check.advice)}", "green")
        grid.add_row(Text(mark, style), Text(check.id, "bold" if serious else ""), message)
    return grid


def _sections(verification: Verification, canvas: Canvas) -> Iterator[tuple[str, RenderableType]]:
    room = canvas.width - _TITLE_CELLS
    if verification.model is not None:
        where = f" on {verification.device}" if verification.device else ""
        yield "Model", Text(safe_text(f"{verification.model}{where}"))
    elif verification.suggestion is not None:
        suggested = (f"--model {safe_text(verification.suggestion)}", "green")
        yield "Model", Text.assemble("none given; the file suggests ", suggested)
    if verification.load is not None:
        yield "Loaded", _joined(_load(verification.load))
    if verification.predictions is not None:
        yield "Answers", _joined(_predictions(verification.predictions, canvas, room))
        if verification.predictions.top:
            yield "Likeliest", _likeliest(verification.predictions)
    if verification.metrics:
        yield "Metrics", _metrics(verification.metrics)
    if verification.speed:
        shown = {title: verification.speed.get(name) for name, title in _SHOWN_SPEED.items()}
        yield "Speed", _flow({title: value for title, value in shown.items() if value is not None}, room)
    if verification.notes:
        yield "Notes", _joined(Text(safe_text(note), "dim") for note in verification.notes)


def _load(report: LoadReport) -> Iterator[Text]:
    exact = report.coverage >= 1 and report.is_exact
    style = "green" if exact else "bold red"
    yield Text.assemble(
        (f"{report.coverage:.1%} of the parameters", style),
        f", {plural(len(report.matched) + len(report.tied), 'tensor')}",
    )
    for kind in ("missing", "unexpected"):
        names = getattr(report, kind)
        if names:
            shown = ", ".join(safe_text(name) for name in names[:_MAX_NAMES])
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            yield Text(f"{len(names)} {kind}: {shown}{more}")
    for item in report.mismatched[:_MAX_NAMES]:
        yield Text(safe_text(f"{item.name}: the model has {item.model}, the file {item.file}"))
    if len(report.mismatched) > _MAX_NAMES:
        yield Text(f"and {len(report.mismatched) - _MAX_NAMES} more that do not fit: --json lists all", "dim")


def _predictions(predictions: Predictions, canvas: Canvas, room: int) -> Iterator[Text]:
    classes = "" if predictions.classes is None else f", {predictions.classes:,} classes"
    yield Text(f"{predictions.task} on {plural(predictions.inputs, 'input')} ({predictions.kind}){classes}")
    numbers = {name: value for name, value in predictions.statistics.items() if value is not None}
    shown = {name: numbers[name] for name in _SHOWN_STATISTICS if name in numbers} or numbers
    if shown:
        yield _flow(shown, room)
    yield from _histogram(predictions, canvas, room)


def _likeliest(predictions: Predictions) -> Table:
    """List the likeliest classes of each input that was asked for."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", overflow="fold")
    for _ in predictions.top[0][1]:
        grid.add_column(overflow="fold")
    for name, ranked in predictions.top:
        cells = (
            Text.assemble(f"{_class_title(index, class_name)} ", (f"{chance:.1%}", "cyan"))
            for index, class_name, chance in ranked
        )
        grid.add_row(foreign(name, width=_NAME_CELLS), *cells)
    return grid


def _class_title(index: int, name: str) -> str:
    return f"class {index}" if name == str(index) else safe_text(shorten(name, _NAME_CELLS))


def _histogram(predictions: Predictions, canvas: Canvas, room: int) -> Iterator[Text]:
    ranked = sorted(predictions.histogram.items(), key=lambda item: (-item[1], item[0]))
    cells = min(_BAR_CELLS, room - 30)
    for index, count in ranked[:_MAX_CLASSES]:
        share = count / max(predictions.inputs, 1)
        bar = canvas.glyphs.bar * max(1, round(min(share, 1.0) * cells))
        yield Text.assemble(f"class {index:>4}  ", (f"{bar:<{cells}}", "cyan"), f"  {count:>4}  {share:>4.0%}")
    if len(ranked) > _MAX_CLASSES:
        rest = sum(count for _, count in ranked[_MAX_CLASSES:])
        yield Text(f"{len(ranked) - _MAX_CLASSES} more classes with {rest} answers: --json lists all", "dim")


def _metrics(metrics: Mapping[str, Any]) -> Table:
    """Lay averages of one kind out beside each other, and put what has none above them."""
    averaged: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        stem, _, average = name.rpartition("_")
        row = averaged.setdefault(stem, {}) if average in _AVERAGES else averaged.setdefault(name, {})
        row[average if average in _AVERAGES else ""] = value
    columns = [average for average in ("", *_AVERAGES) if any(average in row for row in averaged.values())]
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column()
    for _ in columns:
        grid.add_column(justify="right")
    if len(columns) > 1:
        grid.add_row("", *(Text(average, "dim") for average in columns))
    for name, row in averaged.items():
        cells = (Text(_number(row[average]) if average in row else "", "bold") for average in columns)
        grid.add_row(Text(safe_text(name).replace("_", " "), "dim"), *cells)
    return grid


def _beside(beside: SideBySide, canvas: Canvas) -> Table:
    """Show how far each agrees with the first, and the inputs that they answer differently."""
    border = box.ROUNDED if canvas.unicode else box.ASCII
    table = Table(title="Side by side", title_style="bold cyan", title_justify="left", box=border, expand=False)
    table.add_column("")
    for title in file_names(beside.paths):
        table.add_column(foreign(title, width=_NAME_CELLS), overflow="fold")
    for name in beside.agreements[0]:
        cells = (Text(_number(agreement[name])) for agreement in beside.agreements)
        table.add_row(Text(name.replace("_", " "), "dim"), *cells)
    differing = [(name, found) for name, found in beside.rows if len({index for index, _ in found}) > 1]
    for number, (name, found) in enumerate(differing[:_MAX_DIFFERING]):
        answers = (_answer(index, probability) for index, probability in found)
        if not number:
            table.add_section()
        table.add_row(foreign(name, "bold", _NAME_CELLS), *answers)
    if beside.rows:
        left = len(differing) - _MAX_DIFFERING
        more = f"; {left} more of them: --json lists all" if left > 0 else ""
        table.caption_justify = "left"
        table.caption = f"{len(differing)} of {len(beside.rows)} inputs are answered differently{more}"
    return table


def _answer(index: int, probability: float) -> str:
    return "NaN" if math.isnan(probability) else f"class {index} ({probability:.0%})"


def _summary(verifications: Sequence[Verification]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold", style="dim")
    for verification in verifications:
        style, _ = _VERDICTS[verification.verdict]
        wrong = ", ".join(check.id for check in verification.checks if check.status in ("fail", "inconclusive"))
        grid.add_row(Text(verification.verdict.upper(), style), foreign(verification.path, "bold"), Text(wrong))
    return grid


def _flow(values: Mapping[str, Any], room: int) -> Text:
    """Write named numbers one after the other; a line breaks between two of them only."""
    text, used = Text(), 0
    for name, value in values.items():
        label, number = f"{safe_text(name).replace('_', ' ')} ", _number(value)
        cells = cell_len(label) + cell_len(number)
        if used:
            is_full = used + 3 + cells > room
            text.append("\n" if is_full else "   ")
            used = 0 if is_full else used + 3
        text.append(label, "dim").append(number, "bold")
        used += cells
    return text


def _number(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4g}" if isinstance(value, float) else safe_text(f"{value:,}" if type(value) is int else str(value))


def _joined(lines: Iterator[Text]) -> Text:
    return Text("\n").join(lines)
