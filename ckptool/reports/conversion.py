"""What strip-prefixes and convert did: a summary for people, lines for programs, one JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ckptool.model.conversion import BESIDE, Conversion, Dropped
from ckptool.reports.canvas import Canvas
from ckptool.reports.text import plural, row, safe_text, size_text

SCHEMA = "ckptool.convert/1"
_LABEL_CELLS = 11  # of the label before every line but the first
_SHOWN = 8  # how many items of a list the summary shows; the last line says how to see the rest


def document(conversion: Conversion) -> dict[str, Any]:
    """Lay one conversion out as the fields of a JSON object (sizes in bytes); ``map`` is what ``--map`` reads."""
    return {
        "source": str(conversion.source),
        "target": None if conversion.target is None else str(conversion.target),
        "format": conversion.kind,
        "dry_run": conversion.dry_run,
        "state_dict": {"path": conversion.state_dict, "role": conversion.role},
        "already_clean": conversion.already_clean,
        "certainty": conversion.certainty,
        "wrappers": [asdict(wrapper) for wrapper in conversion.wrappers],
        "shards": [
            {"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.keys)} for shard in conversion.shards
        ],
        "index": conversion.index_name or None,
        "tensors": conversion.tensors,
        "renamed": len(conversion.renamed),
        "map": {move.source: move.target for move in conversion.moves},
        "dropped": [
            {"name": dropped.name, "reason": dropped.reason, "bytes": dropped.nbytes} for dropped in conversion.dropped
        ],
        "flattened": list(conversion.flattened),
        "made_dense": [asdict(made) for made in conversion.made_dense],
        "ties": [asdict(tie) for tie in conversion.ties],
        "casts": [asdict(loss) for loss in conversion.casts],
        "notes": [asdict(note) for note in conversion.notes],
        "source_bytes": conversion.source_bytes,
        "target_bytes": conversion.target_bytes,
        "digest": conversion.digest,
        "averaged": [str(path) for path in conversion.averaged],
    }


def plain(conversion: Conversion) -> str:
    """Write one conversion as tab-separated lines, the kind of each in its first cell; nothing is cut."""
    return "".join(f"{line}\n" for line in _plain_lines(conversion))


def _plain_lines(conversion: Conversion) -> Iterator[str]:
    yield row("planned" if conversion.dry_run else "wrote", conversion.target, conversion.kind)
    yield from (row("shard", shard.name, shard.nbytes, len(shard.keys)) for shard in conversion.shards)
    if conversion.index_name:
        yield row("index", conversion.index_name)
    yield row("state_dict", conversion.state_dict, conversion.role)
    yield row("tensors", conversion.tensors)
    yield row("bytes", conversion.source_bytes, conversion.target_bytes)
    for wrapper in conversion.wrappers:
        yield row("wrapper", wrapper.segment, wrapper.name, f"{wrapper.count}/{wrapper.of}", wrapper.certainty)
    for move in conversion.renamed:
        yield row("renamed", move.source, move.target)
    for dropped in conversion.dropped:
        yield row("dropped", dropped.name, dropped.reason, dropped.nbytes)
    for place in conversion.flattened:
        yield row("flattened", place)
    for made in conversion.made_dense:
        yield row("dense", made.name, made.was)
    for tie in conversion.ties:
        yield row("tie", tie.name, tie.kept, "written" if tie.written else "alias")
    for loss in conversion.casts:
        yield row("cast", *asdict(loss).values())
    if conversion.digest is not None:
        yield row("digest", conversion.digest)


def view(conversion: Conversion, canvas: Canvas) -> str:
    """Write one conversion for a person."""
    lines = [(style, part) for style, line in _summary_lines(conversion) for part in _wrap(line, canvas.width)]
    return "".join(f"{canvas.paint(line, style)}\n" for style, line in lines)


def _wrap(line: str, width: int) -> list[str]:
    """Break a line between words where it is full; a name is never broken: it is there to be copied."""
    start = _LABEL_CELLS if line.startswith(" ") else 0
    text = textwrap.wrap(line[start:], width - _LABEL_CELLS, break_long_words=False, break_on_hyphens=False)
    return [line[:start] + text[0], *(" " * _LABEL_CELLS + part for part in text[1:])]


def _summary_lines(conversion: Conversion) -> Iterator[tuple[str, str]]:
    yield "bold", f"{_headline(conversion)}"
    took = f'state dict "{conversion.state_dict}"' if conversion.state_dict else "the state dict at the top"
    yield "", f"  took     {safe_text(took)} ({conversion.role}): {plural(conversion.tensors, 'tensor')}"
    yield from _listed("files", "", list(_files(conversion)))
    yield from _keys(conversion)
    yield from _beside(conversion)
    losses = [dropped for dropped in conversion.dropped if dropped.reason != BESIDE]
    yield from _listed("dropped", "yellow", [_dropped_text(dropped) for dropped in losses])
    yield from _listed("fields", "yellow", [f"{safe_text(place)} kept as plain data" for place in conversion.flattened])
    made = [safe_text(f"{made.name} (was {made.was})") for made in conversion.made_dense]
    yield from _listed("dense", "yellow", made)
    yield from _listed("tied", "", [safe_text(f"{tie.name} = {tie.kept}") for tie in conversion.ties])
    yield from _casts(conversion)
    if conversion.digest is not None:
        yield "", f"  digest   {conversion.digest}"


def _headline(conversion: Conversion) -> str:
    before = size_text(conversion.source_bytes)
    after = size_text(conversion.target_bytes)
    if conversion.dry_run:
        return f"{_name(conversion.source)} ({before}) would become {after} of tensors; nothing was written"
    return f"{_name(conversion.source)} ({before}) -> {_name(conversion.target)} ({after}, {conversion.kind})"


def _files(conversion: Conversion) -> Iterator[str]:
    for shard in conversion.shards:
        yield f"{safe_text(shard.name)} ({plural(len(shard.keys), 'tensor')}, {size_text(shard.nbytes)})"
    if conversion.index_name:
        yield safe_text(conversion.index_name)


def _name(path: Path | None) -> str:
    return safe_text(str(path))


def _keys(conversion: Conversion) -> Iterator[tuple[str, str]]:
    if conversion.already_clean:
        yield "green", "  keys     already clean"
        return
    for wrapper in conversion.wrappers:
        text = f"{wrapper.segment} of {wrapper.name}, on {wrapper.count} of {wrapper.of} keys ({wrapper.certainty})"
        yield "cyan", f"  stripped {safe_text(text)}"
    moves = [f"{safe_text(move.source)} -> {safe_text(str(move.target))}" for move in conversion.renamed]
    yield from _listed("renamed", "", moves)


def _beside(conversion: Conversion) -> Iterator[tuple[str, str]]:
    """Name in one line what stood beside the weights and stays behind."""
    beside = [dropped for dropped in conversion.dropped if dropped.reason == BESIDE]
    if beside:
        nbytes = sum(dropped.nbytes for dropped in beside)
        names = ", ".join(safe_text(dropped.name) for dropped in beside)
        yield "yellow", f"  left out {names} ({size_text(nbytes)} of tensors)"


def _dropped_text(dropped: Dropped) -> str:
    size = f", {size_text(dropped.nbytes)}" if dropped.nbytes else ""
    return f"{safe_text(dropped.name)} ({safe_text(dropped.reason)}{size})"


def _casts(conversion: Conversion) -> Iterator[tuple[str, str]]:
    if not conversion.casts or conversion.dry_run:
        return
    changed = [loss for loss in conversion.casts if loss.overflowed or loss.saturated or loss.underflowed]
    worst = max(conversion.casts, key=lambda loss: loss.largest_relative_error)
    text = f"{plural(len(conversion.casts), 'tensor')} to {worst.target}, largest relative error "
    yield "", f"  cast     {text}{worst.largest_relative_error:.2g} in {safe_text(worst.key)}"
    yield from _listed(
        "lost",
        "red",
        [
            f"{safe_text(loss.key)}: {loss.overflowed} overflowed, {loss.saturated} saturated, "
            f"{loss.underflowed} underflowed of {loss.elements}"
            for loss in changed
        ],
    )


def _listed(label: str, style: str, items: list[str]) -> Iterator[tuple[str, str]]:
    """Show the first items under one label; a cut list says how many more there are and where they are listed."""
    for index, item in enumerate(items[:_SHOWN]):
        yield style, f"  {label if index == 0 else '':<8} {item}"
    if len(items) > _SHOWN:
        yield "dim", f"  {'':<8} ... and {len(items) - _SHOWN:,} more: pipe this command or add --json to list all"
