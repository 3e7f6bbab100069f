"""What inspect found, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ckptool.model.inspection import (
    Architecture,
    ArchitectureMatch,
    DiskUse,
    Inspection,
    KeySummary,
    Layer,
    ModuleNode,
    Safety,
    StateDictSummary,
)
from ckptool.model.plans import KeyMove, Wrapper
from ckptool.model.training import Fact, Training
from ckptool.model.values import GlobalUse
from ckptool.reports.canvas import Canvas
from ckptool.reports.listing import tensor_listing, tree_listing
from ckptool.reports.parts import (
    MAX_SHOWN,
    TITLE_WIDTH,
    Lines,
    flow,
    foreign,
    line,
    say_rest,
    section_grid,
    stacked_bar,
)
from ckptool.reports.phrases import format_phrase, value_phrase
from ckptool.reports.structure import structure_phrases
from ckptool.reports.text import count_text, plural, safe_text, shape_text, size_text

_MAX_VALUES = 16
_SHORT_SETTING = 36
# Said by the wrapper's own line.
_SAID_ELSEWHERE = frozenset({"wrapper-segments"})

_SHARDED_FORMATS = {
    "torch-shards": "torch",
    "safetensors-shards": "safetensors",
    "torch-distributed": "torch distributed",
    "deepspeed-zero": "DeepSpeed ZeRO",
}
_VERDICTS = {
    "clean": ("green", "clean"),
    "unknown": ("yellow", "unknown: it names foreign classes, which are only data here"),
    "dangerous": ("bold red", "dangerous: it can run commands where it is loaded without weights_only"),
}
_SEVERITY_STYLES = {"safe": "green", "info": "cyan", "unknown": "yellow", "dangerous": "bold red"}
_ROLE_STYLES = {"main": "green", "ema": "blue", "raw": "magenta", "peer": "yellow"}
_CERTAINTY_STYLES = {"certain": "green", "assumed": "yellow", "reference": "green", "explicit": "green"}
_DISK_GROUPS = (
    ("weights", "weights", "cyan"),
    ("ema", "EMA", "blue"),
    ("optimizer", "optimizer", "magenta"),
    ("other", "other", "bright_black"),
    ("hidden", "hidden", "red"),
)

# How an architecture is told, by what agrees.
_MATCHES = {
    "exact": "{0}",
    "head": "{0}, but for its ends",
    "nearest": "closest to {0}: {1} of the tensors agree",
    "structure": "modules as in {0}, other sizes",
}


def view(inspection: Inspection, canvas: Canvas) -> str:
    """Draw one inspection; where a list was asked for, draw the head and the list."""
    head = canvas.draw(_head(inspection, canvas))
    lists = []
    if inspection.tree is not None:
        lists.append(tree_listing(inspection.tree, canvas))
    if inspection.tensors is not None:
        lists.append(tensor_listing(inspection.tensors, canvas))
    return head + (
        "\n".join(lists) if lists else canvas.draw(_sections(inspection, canvas)) + _next(inspection, canvas)
    )


def refused_view(path: str, safety: Safety, canvas: Canvas) -> str:
    """Draw what the pickle of a file named before the file turned out to be unreadable."""
    return canvas.draw(section_grid([("Safety", [foreign(path, "bold"), *_judged(safety, canvas)])]))


def _head(inspection: Inspection, canvas: Canvas) -> Panel:
    producer = " ".join(filter(None, (inspection.producer.name, inspection.producer.version)))
    container = _container(inspection)
    names = [container] if container.startswith(producer) else [producer, container]
    lines = [flow([*(foreign(name, "bold") for name in names), size_text(inspection.file_bytes)], canvas)]
    if inspection.selected is not None:
        lines.append(flow(_measure(inspection.selected), canvas))
    border = box.ROUNDED if canvas.unicode else box.ASCII
    title = foreign(inspection.path, "bold")
    return Panel(Text("\n").join(lines), title=title, title_align="left", border_style="cyan", box=border)


def _container(inspection: Inspection) -> str:
    if inspection.shards:
        return f"{_SHARDED_FORMATS[inspection.format]} in {plural(len(inspection.shards), 'shard')}"
    return format_phrase(inspection.format)


def _measure(summary: StateDictSummary) -> list[str]:
    dtypes = [safe_text(share.dtype) for share in summary.dtypes]
    shown = ", ".join(dtypes[:4]) + (f" and {len(dtypes) - 4} more" if len(dtypes) > 4 else "")
    parameters = f"{count_text(summary.parameters)} parameters"
    return [plural(summary.tensors, "tensor"), parameters, size_text(summary.nbytes), shown]


def _sections(inspection: Inspection, canvas: Canvas) -> Table:
    return section_grid((title, draw(inspection, canvas)) for title, draw in _SECTIONS.items())


def _state_dicts(inspection: Inspection, canvas: Canvas) -> Lines:
    summaries = inspection.state_dicts
    for summary in summaries[:MAX_SHOWN]:
        mark = Text(f"{canvas.glyphs.yes if summary.selected else ' '} ", "green")
        name = foreign(summary.path or "(the file itself)", "bold" if summary.selected else "")
        role = Text(summary.role, _ROLE_STYLES[summary.role])
        size = (plural(summary.tensors, "tensor"), size_text(summary.nbytes))
        yield line(mark, flow([name, role, *size], canvas))
    yield from say_rest(len(summaries) - MAX_SHOWN, "--json")


def _shards(inspection: Inspection, canvas: Canvas) -> Lines:
    for shard in inspection.shards[:MAX_SHOWN]:
        keys = plural(len(shard.keys), "tensor")
        yield flow([foreign(shard.name), keys, size_text(shard.nbytes)], canvas)
    yield from say_rest(len(inspection.shards) - MAX_SHOWN, "--json")


def _disk(inspection: Inspection, canvas: Canvas) -> Lines:
    groups = list(_present_groups(inspection.disk))
    yield stacked_bar([(canvas.glyphs.bar, nbytes, style) for _, nbytes, style in groups], canvas)
    yield flow([Text(f"{name} {size_text(nbytes)}", style) for name, nbytes, style in groups], canvas)


def _present_groups(disk: DiskUse) -> Iterator[tuple[str, int, str]]:
    for field, name, style in _DISK_GROUPS:
        nbytes = getattr(disk, field)
        if nbytes:
            yield name, nbytes, style


def _keys(inspection: Inspection, canvas: Canvas) -> Lines:
    keys = inspection.keys
    yield _cleanness(keys, canvas)
    yield from (_wrapper(wrapper, canvas) for wrapper in keys.wrappers)
    yield from (_move(move, canvas) for move in keys.examples)
    yield from say_rest(keys.renamed - len(keys.examples), "strip-prefixes --dry-run --json")
    for move in keys.dropped[:MAX_SHOWN]:
        yield line(foreign(move.source), Text(" would be dropped: ", "yellow"), foreign(move.reason))
    yield from say_rest(len(keys.dropped) - MAX_SHOWN, "--json")


def _cleanness(keys: KeySummary, canvas: Canvas) -> Text:
    if keys.refusal is not None:
        return line(Text(f"{canvas.glyphs.no} ", "red"), safe_text(keys.refusal.text))
    if keys.already_clean:
        return Text(f"{canvas.glyphs.yes} clean", "green")
    return Text(f"{canvas.glyphs.no} not clean: a plain model has other names for them", "yellow")


def _wrapper(wrapper: Wrapper, canvas: Canvas) -> Text:
    name = line(foreign(wrapper.segment, "bold"), " by ", foreign(wrapper.name))
    share = f"on {wrapper.count:,} of {wrapper.of:,} keys"
    return flow([name, share, Text(wrapper.certainty, _CERTAINTY_STYLES[wrapper.certainty])], canvas)


def _move(move: KeyMove, canvas: Canvas) -> Text:
    """Show a rename, with the segments that go in red."""
    kept = set((move.target or "").split("."))
    source = Text(".").join([foreign(part, "" if part in kept else "red") for part in move.source.split(".", 32)])
    return line(source, Text(f" {canvas.glyphs.arrow} ", "dim"), foreign(move.target or "", "green"))


def _not_dense(inspection: Inspection, canvas: Canvas) -> Lines:
    for tensor in inspection.not_dense[:MAX_SHOWN]:
        name = foreign(tensor.key or tensor.source_key, "bold")
        what = " ".join(filter(None, (tensor.kind, tensor.detail, tensor.dtype)))
        facts = [
            f"{fact.replace('_', ' ')} {value_phrase(value)}" for fact, value in tensor.facts.items() if value != []
        ]
        sizes = (shape_text(tensor.shape), size_text(tensor.nbytes))
        yield flow([name, foreign(what, "yellow"), *sizes, *map(foreign, facts)], canvas)
    yield from say_rest(len(inspection.not_dense) - MAX_SHOWN, "--json")


def _ties(inspection: Inspection, canvas: Canvas) -> Lines:
    for names in inspection.ties[:MAX_SHOWN]:
        yield foreign(" = ".join(names))
    yield from say_rest(len(inspection.ties) - MAX_SHOWN, "--json")


def _network(inspection: Inspection, canvas: Canvas) -> Lines:
    architecture = inspection.architecture
    if architecture is None:
        return
    if architecture.match is not None:
        yield from _match(architecture.match, canvas)
    yield flow(structure_phrases(architecture.structure), canvas)
    ends = [_layer(layer, canvas) for layer in dict.fromkeys((architecture.first, architecture.last)) if layer]
    if ends:
        yield flow(ends, canvas, " ... ")
    yield flow(_dimensions(architecture), canvas)
    yield flow([f"{count:,} {kind}" for kind, count in architecture.layers.items()], canvas)
    yield flow([_block(block) for block in architecture.blocks[:_MAX_VALUES]], canvas)
    yield from say_rest(len(architecture.blocks) - _MAX_VALUES, "--tree")


def _match(match: ArchitectureMatch, canvas: Canvas) -> Lines:
    """Say which architecture it is; the names of the index are ours, those in the differences may be the file's."""
    shown = list(filter(None, (match.name, *match.alternatives)))
    names = f" {'=' if match.kind == 'exact' else 'or'} ".join(shown[:MAX_SHOWN])
    yield Text(_MATCHES[match.kind].format(names, f"{match.score:.0%}"), "bold")
    yield from say_rest(len(shown) - MAX_SHOWN, "--json")
    if match.differences:
        yield flow(map(foreign, match.differences), canvas, "; ")


def _layer(layer: Layer, canvas: Canvas) -> Text:
    width = f" {layer.kind} {layer.inputs:,} {canvas.glyphs.arrow} {layer.outputs:,}"
    return line(foreign(layer.name or "(the model itself)", "bold"), width)


def _dimensions(architecture: Architecture) -> Iterator[str]:
    if architecture.input_channels is not None:
        yield f"input channels: {architecture.input_channels:,}"
    if architecture.widths:
        yield f"widths: {', '.join(map(str, architecture.widths[:12]))}" + (", ..." if architecture.widths[12:] else "")
    if architecture.vocabulary is not None:
        yield f"vocabulary: {architecture.vocabulary:,}"
    classes = architecture.classes
    if classes is not None or architecture.vocabulary is None:
        yield f"classes: {'unknown' if classes is None else format(classes, ',')}"


def _block(block: ModuleNode) -> Text:
    return line(foreign(block.name), Text(f" {count_text(block.elements)}", "dim"))


def _training(inspection: Inspection, canvas: Canvas) -> Lines:
    training = inspection.training
    progress = [_fact(name, fact) for name, fact in _progress(training) if fact is not None]
    if progress:
        yield flow(progress, canvas)
    if training.metrics:
        yield flow([_fact(name, fact) for name, fact in list(training.metrics.items())[:_MAX_VALUES]], canvas)
        yield from say_rest(len(training.metrics) - _MAX_VALUES, "--json")
    for name, fact in (("compiled", training.compiled), ("strategy", training.strategy), ("EMA", training.ema)):
        if fact is not None:
            yield line(_fact(name, fact), " ", foreign(f"({fact.evidence})", "dim"))


def _progress(training: Training) -> Iterator[tuple[str, Fact | None]]:
    yield "epoch", training.epoch
    yield "step", training.global_step
    yield "learning rate", training.learning_rate
    yield "optimizer", training.optimizer
    yield from training.versions.items()


def _fact(name: str, fact: Fact) -> Text:
    return line(foreign(name, "dim"), " ", foreign(value_phrase(fact.value), "bold"))


def _settings(inspection: Inspection, canvas: Canvas) -> Lines:
    yield from _named_values(inspection.hyper_parameters, canvas)


def _metadata(inspection: Inspection, canvas: Canvas) -> Lines:
    yield from _named_values(inspection.metadata, canvas)


def _named_values(values: Any, canvas: Canvas) -> Lines:
    """Show short values in one paragraph, the others a line each."""
    if not isinstance(values, Mapping) or not values:
        return
    phrases = {name: value_phrase(value) for name, value in list(values.items())[:_MAX_VALUES]}
    short = [name for name, phrase in phrases.items() if len(name) + len(phrase) < _SHORT_SETTING]
    if short:
        yield flow([_setting(name, phrases[name]) for name in short], canvas, "  ")
    yield from (_setting(name, phrase) for name, phrase in phrases.items() if name not in short)
    yield from say_rest(len(values) - len(phrases), "--json")


def _setting(name: str, phrase: str) -> Text:
    return line(foreign(name, "dim"), Text("=", "dim"), foreign(phrase))


def _safety(inspection: Inspection, canvas: Canvas) -> Lines:
    return _judged(inspection.safety, canvas)


def _judged(safety: Safety, canvas: Canvas) -> Lines:
    style, verdict = _VERDICTS[safety.verdict]
    mark = canvas.glyphs.yes if safety.verdict == "clean" else canvas.glyphs.no
    yield flow([Text(f"{mark} {verdict}", style), _named_globals(safety.globals)], canvas)
    worrying = [use for use in safety.globals if use.ref.severity in ("unknown", "dangerous")]
    worrying.sort(key=lambda use: use.ref.severity)  # "dangerous" comes first
    yield from map(_global, worrying[:MAX_SHOWN])
    yield from say_rest(len(worrying) - MAX_SHOWN, "--json")


def _named_globals(uses: Sequence[GlobalUse]) -> str:
    return f"{plural(len(uses), 'global')} named" if uses else "nothing in it can run"


def _global(use: GlobalUse) -> Text:
    role = "called" if use.called else "named"
    name = foreign(use.ref.full_name, _SEVERITY_STYLES[use.ref.severity])
    return line(name, Text(f" {use.ref.severity}, {role} at ", "dim"), foreign(use.where, "dim"))


def _notes(inspection: Inspection, canvas: Canvas) -> Lines:
    for note in inspection.notes:
        if note.code not in _SAID_ELSEWHERE:
            yield Text(safe_text(note.text))


def _next(inspection: Inspection, canvas: Canvas) -> str:
    """Write the command on one line, however long: it is there to be copied, and a fold would cut it in two."""
    title, below = canvas.paint(f"{'Next':{TITLE_WIDTH}}", "bold cyan"), " " * TITLE_WIDTH
    command = canvas.paint(safe_text(inspection.next.command), "bold green")
    return f"{title}{command}\n{below}{canvas.paint(inspection.next.reason, 'dim')}\n"


_SECTIONS: Mapping[str, Callable[[Inspection, Canvas], Lines]] = {
    "Holds": _state_dicts,
    "Shards": _shards,
    "On disk": _disk,
    "Keys": _keys,
    "Not dense": _not_dense,
    "Ties": _ties,
    "Network": _network,
    "Training": _training,
    "Settings": _settings,
    "Metadata": _metadata,
    "Safety": _safety,
    "Notes": _notes,
}
