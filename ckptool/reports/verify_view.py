"""What verify found, for a person at a terminal: the verdict first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ckptool.model.loading import LoadReport
from ckptool.model.verification import Check, Predictions, Verification
from ckptool.reports.canvas import Canvas
from ckptool.reports.text import plural, safe_text, shorten

_LONGEST = 160
_BAR_CELLS = 30
_MAX_CLASSES = 10
_MAX_NAMES = 6

_VERDICTS = {
    "pass": ("bold green", "sound"),
    "fail": ("bold red", "not sound"),
    "inconclusive": ("bold yellow", "cannot be settled with these inputs"),
    "error": ("bold red", "could not be read"),
}
_MARKS = {
    "pass": ("ok", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
    "skip": ("skip", "bright_black"),
    "inconclusive": ("open", "yellow"),
}
_SHOWN_SPEED = {
    "avg_time_per_sample_ms": "ms per sample",
    "median_time_per_sample_ms": "median",
    "p95_time_per_sample_ms": "p95",
    "throughput_samples_per_sec": "samples per second",
}


def view(verification: Verification, canvas: Canvas) -> str:
    """Draw one verification."""
    text = canvas.draw(_head(verification, canvas)) + canvas.draw(_checks(verification.checks))
    sections = list(_sections(verification, canvas))
    if sections:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for title, lines in sections:
            grid.add_row(Text(title), Text("\n").join(lines))
        text += canvas.draw(grid)
    return text


def _head(verification: Verification, canvas: Canvas) -> Panel:
    style, meaning = _VERDICTS[verification.verdict]
    counts: dict[str, int] = {}
    for check in verification.checks:
        counts[check.status] = counts.get(check.status, 0) + 1
    said = ", ".join(f"{count} {_MARKS[status][0].lower()}" for status, count in counts.items())
    line = Text.assemble((verification.verdict.upper(), style), f"  {meaning}", (f"  ({said})", "dim"))
    border = box.ROUNDED if canvas.unicode else box.ASCII
    return Panel(line, title=_foreign(verification.path, "bold"), title_align="left", border_style=style, box=border)


def _checks(checks: tuple[Check, ...]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.status]
        message = Text(safe_text(check.message), "" if check.status in ("fail", "warn", "inconclusive") else "dim")
        if check.advice and check.status != "pass":
            message.append(f"\n{safe_text(check.advice)}", "green")
        grid.add_row(Text(mark, style), Text(check.id), message)
    return grid


def _sections(verification: Verification, canvas: Canvas) -> Iterator[tuple[str, list[Text]]]:
    if verification.model is not None:
        where = f" on {verification.device}" if verification.device else ""
        yield "Model", [Text(safe_text(f"{verification.model}{where}"))]
    elif verification.suggestion is not None:
        yield "Model", [Text.assemble("none given; the file suggests ", (safe_text(verification.suggestion), "green"))]
    if verification.load is not None:
        yield "Loaded", list(_load(verification.load))
    if verification.predictions is not None:
        yield "Answers", list(_predictions(verification.predictions, canvas))
    if verification.metrics:
        yield "Metrics", [_named_numbers(verification.metrics)]
    if verification.speed:
        shown = {title: verification.speed.get(name) for name, title in _SHOWN_SPEED.items()}
        yield "Speed", [_named_numbers({title: value for title, value in shown.items() if value is not None})]


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


def _predictions(predictions: Predictions, canvas: Canvas) -> Iterator[Text]:
    classes = f", {plural(predictions.classes, 'class').replace('classs', 'classes')}" if predictions.classes else ""
    yield Text(f"{predictions.task} on {plural(predictions.inputs, 'input')} ({predictions.kind}){classes}")
    numbers = {name: value for name, value in predictions.statistics.items() if value is not None}
    if numbers:
        yield _named_numbers(numbers)
    yield from _histogram(predictions, canvas)
    for name, ranked in predictions.top:
        answers = ", ".join(f"{safe_text(class_name)} {chance:.1%}" for _, class_name, chance in ranked)
        yield Text.assemble(_foreign(name, "bold"), f"  {answers}")


def _histogram(predictions: Predictions, canvas: Canvas) -> Iterator[Text]:
    ranked = sorted(predictions.histogram.items(), key=lambda item: (-item[1], item[0]))
    for index, count in ranked[:_MAX_CLASSES]:
        share = count / max(predictions.inputs, 1)
        bar = canvas.glyphs.bar * max(1, round(share * _BAR_CELLS))
        yield Text.assemble(f"class {index:>4}  ", (f"{bar:<{_BAR_CELLS}}", "cyan"), f"  {count:>4}  {share:.0%}")
    if len(ranked) > _MAX_CLASSES:
        rest = sum(count for _, count in ranked[_MAX_CLASSES:])
        yield Text(f"{len(ranked) - _MAX_CLASSES} more classes with {rest} answers: --json lists all", "dim")


def _named_numbers(values: Mapping[str, Any]) -> Text:
    line = Text()
    for name, value in values.items():
        line.append("" if not line else "  ")
        line.append(safe_text(name).replace("_", " ") + " ", "dim")
        line.append(_number(value), "bold")
    return line


def _number(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4g}" if isinstance(value, float) else safe_text(str(value))


def _foreign(text: str, style: str = "") -> Text:
    """Show text out of a file; never as markup."""
    return Text(safe_text(shorten(text, _LONGEST)), style)
