"""What inspect found, as tab-separated lines: what a line tells in its first cell, then the cells of that record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ckptool.model.inspection import (
    Architecture,
    Inspection,
    KeySummary,
    ModuleNode,
    Safety,
    SpecialTensor,
    StateDictSummary,
    TensorRow,
)
from ckptool.model.plans import KeyMove
from ckptool.model.training import Fact, Training
from ckptool.reports.structure import structure_phrases
from ckptool.reports.text import row, shape_text


def lines(inspection: Inspection) -> Iterator[str]:
    """Yield every line of one inspection, nothing cut; sizes in bytes, lists last."""
    producer = inspection.producer
    yield row("path", inspection.path)
    yield row("format", inspection.format, inspection.file_bytes)
    yield from (row("shard", shard.name, shard.nbytes, len(shard.keys)) for shard in inspection.shards)
    yield row("producer", producer.name, producer.version, producer.evidence)
    for group in ("weights", "ema", "optimizer", "other", "hidden"):
        yield row("disk", group, getattr(inspection.disk, group))
    for summary in inspection.state_dicts:
        yield from _state_dict(summary)
    yield from _keys(inspection.keys)
    yield from _training(inspection.training)
    yield from _values("hyper_parameter", inspection.hyper_parameters)
    yield from _values("metadata", inspection.metadata)
    yield from (row("tie", *names) for names in inspection.ties)
    yield from _safety(inspection.safety)
    if inspection.architecture is not None:
        yield from _architecture(inspection.architecture)
    yield from map(_special, inspection.not_dense)
    yield from (row("note", note.code, note.text) for note in inspection.notes)
    yield row("next", inspection.next.command, inspection.next.reason)
    yield from _lists(inspection)


def refused_lines(path: str, safety: Safety) -> Iterator[str]:
    """Yield what the pickle of a file named before the file turned out to be unreadable."""
    yield row("path", path)
    yield from _safety(safety)


def _safety(safety: Safety) -> Iterator[str]:
    yield row("safety", safety.verdict)
    for use in safety.globals:
        yield row("global", use.ref.full_name, use.ref.severity, use.where, "called" if use.called else "named")


def _state_dict(summary: StateDictSummary) -> Iterator[str]:
    selected = "selected" if summary.selected else ""
    counts = (summary.tensors, summary.parameters, summary.nbytes)
    yield row("state_dict", summary.path, summary.role, selected, *counts, summary.reason)
    for share in summary.dtypes:
        yield row("dtype", summary.path, share.dtype, share.tensors, share.elements, share.nbytes)


_CLEAN = {True: "clean", False: "not clean", None: "no plan"}


def _keys(keys: KeySummary) -> Iterator[str]:
    yield row("keys", _CLEAN[keys.already_clean], keys.certainty, keys.renamed, len(keys.dropped))
    if keys.refusal is not None:
        yield row("refusal", keys.refusal.code, keys.refusal.text)
    for wrapper in keys.wrappers:
        yield row("wrapper", wrapper.name, wrapper.segment, wrapper.count, wrapper.of, wrapper.certainty)
    yield from map(_move, keys.examples)
    yield from (row("dropped", move.source, move.reason) for move in keys.dropped)


def _move(move: KeyMove) -> str:
    return row("rename", move.source, move.target)


def _training(training: Training) -> Iterator[str]:
    facts = {field.name: getattr(training, field.name) for field in fields(training)}
    for name, fact in facts.items():
        if isinstance(fact, Fact):
            yield row("training", name, _phrase(fact.value), fact.evidence)
    for group, named in (("metric", training.metrics), ("version", training.versions)):
        for name, fact in named.items():
            yield row(group, name, _phrase(fact.value), fact.evidence)


def _phrase(value: Any) -> str:
    return value if isinstance(value, str) else compact(value)


def _values(record: str, values: Any) -> Iterator[str]:
    """Write the top level of plain values a line each, what is nested as JSON."""
    if isinstance(values, Mapping):
        yield from (row(record, name, _phrase(value)) for name, value in values.items())
    elif values is not None:
        yield row(record, "", compact(values))


def compact(value: Any) -> str:
    """Write a plain value as one line of JSON; letters stay as they are."""
    return json.dumps(value, ensure_ascii=False)


def _architecture(architecture: Architecture) -> Iterator[str]:
    match, structure = architecture.match, architecture.structure
    if match is not None:
        yield row("architecture", match.name, match.family, match.kind, match.score)
        yield from (row("alternative", name) for name in match.alternatives)
        yield from (row("difference", text) for text in match.differences)
    yield from (row("stage", *stage) for stage in structure.stages)
    yield row("structure", *structure_phrases(structure))
    ends = (("first", architecture.first), ("last", architecture.last))
    for position, layer in ((position, layer) for position, layer in ends if layer is not None):
        yield row("layer", position, layer.name, layer.kind, layer.inputs, layer.outputs, shape_text(layer.shape))
    yield from (row("layers", kind, count) for kind, count in architecture.layers.items())
    yield row("widths", *architecture.widths)
    for name in ("input_channels", "classes", "vocabulary"):
        value = getattr(architecture, name)
        yield row(name, "unknown" if value is None else value)
    for block in architecture.blocks:
        yield row("block", block.name, block.repeats, block.tensors, block.elements, block.nbytes)


def _lists(inspection: Inspection) -> Iterator[str]:
    if inspection.tensors is not None:
        yield from map(_tensor, inspection.tensors)
    if inspection.tree is not None:
        yield from _module(inspection.tree, "")


def _special(tensor: SpecialTensor) -> str:
    facts = [f"{name}={json.dumps(value)}" for name, value in tensor.facts.items()]
    parts = [f"{part.name}:{part.dtype}:{shape_text(part.shape)}:{part.nbytes}" for part in tensor.parts]
    what = (tensor.kind, tensor.detail, tensor.dtype, shape_text(tensor.shape), tensor.nbytes)
    return row("not_dense", tensor.key, tensor.source_key, *what, *facts, *parts)


def _tensor(tensor: TensorRow) -> str:
    cells = ("tensor", tensor.key, tensor.dtype, shape_text(tensor.shape), tensor.nbytes, tensor.source_key)
    found = tensor.statistics
    if found is None:
        return row(*cells)
    extremes = (found.minimum, found.maximum, found.mean, found.std)
    return row(*cells, found.elements, found.finite, found.zeros, *extremes)


def _module(node: ModuleNode, parent: str) -> Iterator[str]:
    name = f"{parent}.{node.name}" if parent else node.name
    shape = shape_text(node.shape) if node.dtype else None
    yield row("module", name, node.repeats, node.tensors, node.elements, node.nbytes, node.dtype, shape)
    for child in node.children:
        yield from _module(child, name)
