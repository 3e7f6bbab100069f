"""What inspect found, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ckptool.model.inspection import Architecture, Inspection, KeySummary, Layer, ModuleNode, StateDictSummary
from ckptool.model.plans import KeyMove, Producer, Wrapper
from ckptool.model.training import Fact, Training
from ckptool.model.values import GlobalUse
from ckptool.reports.canvas import Canvas, Glyphs
from ckptool.reports.listing import tensor_listing, tree_listing
from ckptool.reports.phrases import value_phrase
from ckptool.reports.text import count_text, plural, safe_text, shorten, size_text

_LONGEST = 160  # characters of one foreign text; what is longer shows both ends, its length and a checksum
_MAX_SHOWN = 6  # items of one list; the line after them says how many more there are and what shows all
_MAX_VALUES = 16

_FORMATS = {"torch-zip": "torch zip", "torch-legacy": "torch stream (before 1.6)", "safetensors": "safetensors"}
_VERDICTS = {
    "clean": ("green", "clean"),
    "unknown": ("yellow", "unknown: it names foreign classes; here they are data, torch.load would import them"),
    "dangerous": ("bold red", "dangerous: loading it with pickle or torch.load(weights_only=False) can run commands"),
}
_SEVERITY_STYLES = {"safe": "green", "info": "cyan", "unknown": "yellow", "dangerous": "bold red"}
_ROLE_STYLES = {"main": "green", "ema": "blue", "raw": "magenta", "peer": "yellow"}
_DISK_STYLES = {"weights": "cyan", "ema": "blue", "optimizer": "magenta", "other": "bright_black", "hidden": "red"}
_DISK_NAMES = {"ema": "EMA"}

Lines = Iterator[Text]


def view(inspection: Inspection, canvas: Canvas) -> str:
    """Draw one inspection; where a list was asked for, draw the head and the list."""
    head = canvas.draw(_head(inspection, canvas))
    lists = []
    if inspection.tree is not None:
        lists.append(tree_listing(inspection.tree, canvas))
    if inspection.tensors is not None:
        lists.append(tensor_listing(inspection.tensors, canvas))
    return head + ("\n".join(lists) if lists else canvas.draw(_sections(inspection, canvas)))


def _head(inspection: Inspection, canvas: Canvas) -> Panel:
    title = _foreign(inspection.path, "bold")
    origin = [_producer(inspection.producer), _FORMATS.get(inspection.format, inspection.format)]
    lines = [_joined([*filter(None, origin), size_text(inspection.file_bytes)], canvas.glyphs)]
    selected = inspection.selected
    if selected is not None:
        lines.append(_joined(_measure(selected), canvas.glyphs))
    border = box.ROUNDED if canvas.unicode else box.ASCII
    return Panel(Text("\n").join(lines), title=title, title_align="left", border_style="cyan", box=border)


def _producer(producer: Producer) -> str:
    return safe_text(shorten(" ".join(filter(None, (producer.name, producer.version))), _LONGEST))


def _measure(summary: StateDictSummary) -> list[str]:
    dtypes = [share.dtype for share in summary.dtypes]
    return [
        plural(summary.tensors, "tensor"),
        f"{count_text(summary.parameters)} parameters",
        size_text(summary.nbytes),
        ", ".join(map(safe_text, dtypes[:4])) + (f" and {len(dtypes) - 4} more" if len(dtypes) > 4 else ""),
    ]


@dataclass(frozen=True, slots=True)
class _Section:
    """Put a title beside the lines that belong to it."""

    title: str
    lines: Iterable[Text]


def _sections(inspection: Inspection, canvas: Canvas) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for section in _all_sections(inspection, canvas):
        lines = list(section.lines)
        if lines:
            grid.add_row(Text(section.title), Text("\n").join(lines))
    return grid


def _all_sections(inspection: Inspection, canvas: Canvas) -> Iterator[_Section]:
    glyphs = canvas.glyphs
    yield _Section("Holds", _state_dicts(inspection.state_dicts, glyphs))
    yield _Section("On disk", _disk(inspection, canvas))
    yield _Section("Keys", _keys(inspection.keys, glyphs))
    yield _Section("Ties", _ties(inspection.ties))
    if inspection.architecture is not None:
        yield _Section("Network", _architecture(inspection.architecture, glyphs))
    yield _Section("Training", _training(inspection.training, glyphs))
    yield _Section("Settings", _settings(inspection.hyper_parameters))
    yield _Section("Metadata", _settings(inspection.metadata))
    yield _Section("Safety", _safety(inspection, glyphs))
    yield _Section("Notes", [_foreign(note.text) for note in inspection.notes])
    yield _Section("Next", _next(inspection))


def _foreign(text: str, style: str = "") -> Text:
    """Show text out of a file; never as markup."""
    return Text(safe_text(shorten(text, _LONGEST)), style)


def _joined(parts: Iterable[str | Text], glyphs: Glyphs) -> Text:
    texts = [part if isinstance(part, Text) else Text(part) for part in parts]
    return Text(f" {glyphs.dot} ", "dim").join(texts)


def _more(count: int, where: str) -> Lines:
    """Say what a list leaves out, if anything."""
    if count > 0:
        yield Text(f"... and {count:,} more: {where} shows all", "dim")


def _state_dicts(summaries: Sequence[StateDictSummary], glyphs: Glyphs) -> Lines:
    for summary in summaries[:_MAX_SHOWN]:
        mark = Text(f"{glyphs.yes} ", "green") if summary.selected else Text("  ")
        name = _foreign(summary.path or "(the file itself)", "bold" if summary.selected else "")
        size = (plural(summary.tensors, "tensor"), size_text(summary.nbytes))
        yield mark + _joined([name, Text(summary.role, _ROLE_STYLES[summary.role]), *size], glyphs)
    yield from _more(len(summaries) - _MAX_SHOWN, "--json")


def _disk(inspection: Inspection, canvas: Canvas) -> Lines:
    amounts = {name: getattr(inspection.disk, name) for name in _DISK_STYLES}
    present = {name: nbytes for name, nbytes in amounts.items() if nbytes}
    total = sum(present.values())
    room = max(min(canvas.width - 14, 60), 10)
    bar = Text()
    for name, nbytes in present.items():
        bar.append(canvas.glyphs.bar * max(round(room * nbytes / total), 1), _DISK_STYLES[name])
    yield bar
    yield _joined(
        [
            Text(f"{_DISK_NAMES.get(name, name)} {size_text(nbytes)}", _DISK_STYLES[name])
            for name, nbytes in present.items()
        ],
        canvas.glyphs,
    )


def _keys(keys: KeySummary, glyphs: Glyphs) -> Lines:
    if keys.refusal is not None:
        yield Text(f"{glyphs.no} ", "red") + Text(safe_text(keys.refusal.text))
        return
    if keys.already_clean:
        yield Text(f"{glyphs.yes} clean", "green")
    elif keys.already_clean is not None:
        yield Text(f"{glyphs.no} not clean", "yellow")
    yield from (_wrapper(wrapper, glyphs) for wrapper in keys.wrappers)
    yield from (_move(move, glyphs) for move in keys.examples)
    yield from _more(keys.renamed - len(keys.examples), "strip-prefixes --dry-run")
    for move in keys.dropped[:_MAX_SHOWN]:
        yield _foreign(move.source) + Text(" is dropped: ", "yellow") + _foreign(move.reason)
    yield from _more(len(keys.dropped) - _MAX_SHOWN, "--json")


def _wrapper(wrapper: Wrapper, glyphs: Glyphs) -> Text:
    style = "green" if wrapper.certainty == "certain" else "yellow"
    share = f"on {wrapper.count:,} of {wrapper.of:,} keys"
    return _joined(
        [_foreign(wrapper.segment, "bold") + Text(f" of {wrapper.name}"), share, Text(wrapper.certainty, style)], glyphs
    )


def _move(move: KeyMove, glyphs: Glyphs) -> Text:
    """Show a rename, with the segments that go struck out by colour."""
    kept = set((move.target or "").split("."))
    source = Text(".").join([_foreign(part, "" if part in kept else "red") for part in move.source.split(".")])
    return source + Text(f" {glyphs.arrow} ", "dim") + _foreign(move.target or "", "green")


def _ties(ties: Sequence[tuple[str, ...]]) -> Lines:
    for names in ties[:_MAX_SHOWN]:
        yield Text(" = ", "dim").join([_foreign(name) for name in names])
    yield from _more(len(ties) - _MAX_SHOWN, "--json")


def _architecture(architecture: Architecture, glyphs: Glyphs) -> Lines:
    yield _joined([f"{count} {kind}" for kind, count in architecture.layers.items()], glyphs)
    yield _joined([_layer("first", architecture.first, glyphs), _layer("last", architecture.last, glyphs)], glyphs)
    known = (
        ("input channels", architecture.input_channels),
        ("classes", architecture.classes),
        ("vocabulary", architecture.vocabulary),
    )
    ends = [f"{name} {value:,}" for name, value in known if value is not None]
    yield _joined(ends or ["input channels and classes unknown"], glyphs)
    if architecture.widths:
        shown = ", ".join(map(str, architecture.widths[:12]))
        yield Text(f"widths {shown}" + (", ..." if len(architecture.widths) > 12 else ""))
    yield _joined([_block(block) for block in architecture.blocks[:_MAX_VALUES]], glyphs)
    yield from _more(len(architecture.blocks) - _MAX_VALUES, "--tree")


def _layer(position: str, layer: Layer | None, glyphs: Glyphs) -> Text:
    if layer is None:
        return Text(f"{position} layer unknown", "dim")
    width = f" {layer.kind} {layer.inputs:,} {glyphs.arrow} {layer.outputs:,}"
    return Text(f"{position} ", "dim") + _foreign(layer.name or "(the model itself)", "bold") + Text(width)


def _block(block: ModuleNode) -> Text:
    return _foreign(block.name) + Text(f" {count_text(block.elements)}", "dim")


def _training(training: Training, glyphs: Glyphs) -> Lines:
    plain = (("epoch", training.epoch), ("step", training.global_step), ("learning rate", training.learning_rate))
    progress = [_fact(name, fact) for name, fact in plain if fact is not None]
    progress += [_fact(name, fact) for name, fact in training.versions.items()]
    if progress:
        yield _joined(progress, glyphs)
    if training.metrics:
        shown = list(training.metrics.items())[:_MAX_VALUES]
        yield _joined([_fact(name, fact) for name, fact in shown], glyphs)
        yield from _more(len(training.metrics) - _MAX_VALUES, "--json")
    for name, fact in (("compiled", training.compiled), ("strategy", training.strategy), ("EMA", training.ema)):
        if fact is not None:
            yield _fact(name, fact) + Text("  ") + _foreign(fact.evidence, "dim")


def _fact(name: str, fact: Fact) -> Text:
    return _foreign(name, "dim") + Text(" ") + _foreign(value_phrase(fact.value), "bold")


def _settings(values: Any) -> Lines:
    """Show short values in one paragraph, the others a line each."""
    if not isinstance(values, Mapping) or not values:
        return
    phrases = {name: value_phrase(value) for name, value in list(values.items())[:_MAX_VALUES]}
    short = [name for name, phrase in phrases.items() if len(name) + len(phrase) < 40]
    if short:
        yield Text("  ").join([_setting(name, phrases[name]) for name in short])
    yield from (_setting(name, phrase) for name, phrase in phrases.items() if name not in short)
    yield from _more(len(values) - len(phrases), "--json")


def _setting(name: str, phrase: str) -> Text:
    return _foreign(name, "dim") + Text("=") + _foreign(phrase)


def _safety(inspection: Inspection, glyphs: Glyphs) -> Lines:
    uses = inspection.safety.globals
    style, verdict = _VERDICTS[inspection.safety.verdict]
    mark = glyphs.yes if inspection.safety.verdict == "clean" else glyphs.no
    counted = f"{plural(len(uses), 'global')} named" if uses else "no pickle, nothing can run"
    if inspection.format != "safetensors" and not uses:
        counted = "the pickle names nothing"
    yield _joined([Text(f"{mark} {verdict}", style), counted], glyphs)
    worrying = [use for use in uses if use.ref.severity in ("unknown", "dangerous")]
    worrying.sort(key=lambda use: use.ref.severity)
    yield from map(_global, worrying[:_MAX_SHOWN])
    yield from _more(len(worrying) - _MAX_SHOWN, "--json")


def _global(use: GlobalUse) -> Text:
    name = _foreign(use.ref.full_name, _SEVERITY_STYLES[use.ref.severity])
    return (
        name
        + Text(f" {use.ref.severity}, {'called' if use.called else 'named'} at ", "dim")
        + _foreign(use.where, "dim")
    )


def _next(inspection: Inspection) -> Lines:
    # Never shortened: it is there to be copied.
    yield Text(safe_text(inspection.next.command), "bold green")
    yield Text(inspection.next.reason, "dim")
