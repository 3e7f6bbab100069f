"""What diff found, for programs: as a JSON document and as tab-separated lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ckptool.model.comparison import Comparison, Drift, FactChange, KindChange, ModuleChange, ValueChange
from ckptool.reports.json import to_json
from ckptool.reports.text import row, shape_text

SCHEMA = "ckptool.diff/1"


def answer(documents: Sequence[Mapping[str, Any]], drifts: Sequence[Drift], *, several: bool) -> str:
    """Write the JSON document: the fields of one comparison, or several under ``files`` and a row each in ``drift``."""
    if not several:
        return to_json({"schema": SCHEMA, **documents[0]})
    return to_json({"schema": SCHEMA, "files": documents, "drift": [_drift(drift) for drift in drifts]})


def document(found: Comparison, top: int | None = None) -> dict[str, Any]:
    """Give all fields of one comparison; ``top`` cuts the list of values, and nothing else."""
    outcomes = Counter(value.outcome for value in found.values)
    told: dict[str, Any] = {
        "a": found.path_a,
        "b": found.path_b,
        "same": None if found.unknown and not found.differs else found.same,
        "tensors": len(found.names),
        "values_compared": found.options.values,
        "identical": found.identical,
        "outcomes": {outcome: outcomes[outcome] for outcome in ("changed", "close", "same", "unknown")},
        "only_in_a": [name.key for name in found.only_in_a],
        "only_in_b": [name.key for name in found.only_in_b],
        "shape": [_kind(change) for change in found.shape],
        "dtype": [change._asdict() for change in found.dtype],
        "values": [_value(value) for value in found.values[:top]],
        "renamed": [rename._asdict() for rename in found.renamed],
        "ambiguous": [each._asdict() for each in found.ambiguous],
        "map": found.name_map,
        "entries": [_fact(change) for change in found.entries],
    }
    if found.metadata is not None:
        told["metadata"] = [_fact(change) for change in found.metadata]
    if found.tree is not None:
        told["tree"] = _module(found.tree)
    wrappers = {"a": found.wrappers_a, "b": found.wrappers_b}
    told["wrappers"] = {side: [asdict(wrapper) for wrapper in listed] for side, listed in wrappers.items()}
    told["rtol"], told["atol"] = found.options.rtol, found.options.atol
    told["notes"] = [asdict(note) for note in found.notes]
    return told


def _kind(change: KindChange) -> dict[str, Any]:
    return {
        "key": change.key,
        "a": change.shape_a,
        "b": change.shape_b,
        "kind_a": change.a,
        "kind_b": change.b,
    }


def _value(value: ValueChange) -> dict[str, Any]:
    return {**asdict(value), "relative_change": value.relative_change}


def _fact(change: FactChange) -> dict[str, Any]:
    return {
        "group": change.group,
        "key": change.path,
        "in": change.present,
        "a": change.before,
        "b": change.after,
    }


def _module(node: ModuleChange) -> dict[str, Any]:
    own = {each.name: getattr(node, each.name) for each in fields(node)}
    return {**own, "relative_change": node.relative_change, "children": [_module(child) for child in node.children]}


def _drift(drift: Drift) -> dict[str, Any]:
    told = asdict(drift)
    trained = told.pop("progress")
    return {**told, **trained}


def lines(found: Comparison, top: int | None = None) -> Iterator[str]:
    """Yield every line of one comparison: what a line tells in its first cell, then the cells of that record."""
    result = "same" if found.same else "different" if found.differs else "unknown"
    yield row("result", result, found.path_a, found.path_b)
    yield row("tensors", len(found.names), found.identical, len(found.changed))
    yield from (row("only_in_a", name.key, name.dtype, shape_text(name.shape)) for name in found.only_in_a)
    yield from (row("only_in_b", name.key, name.dtype, shape_text(name.shape)) for name in found.only_in_b)
    yield from (row("shape", change.key, change.a, change.b) for change in found.shape)
    for dtype in found.dtype:
        yield row("dtype", dtype.key, dtype.a, dtype.b, _SURVIVED[dtype.same_values])
    yield from map(_value_line, found.values[:top])
    yield from (row("renamed", rename.a, rename.b) for rename in found.renamed)
    yield from (row("ambiguous", _compact(each.a), _compact(each.b)) for each in found.ambiguous)
    for change in (*found.entries, *(found.metadata or ())):
        yield row(change.group, change.path, change.present, _compact(change.before), _compact(change.after))
    if found.tree is not None:
        yield from _module_lines(found.tree, "")
    yield from (row("note", note.code, note.text) for note in found.notes)


_SURVIVED = {True: "same values", False: "other values", None: "not comparable"}


def _value_line(value: ValueChange) -> str:
    shape = shape_text(value.shape)
    counts = (value.elements, value.changed, value.beyond, value.broken)
    sizes = (value.max_abs, value.mean_abs, value.max_rel, value.cosine)
    norms = (value.change_norm, value.weight_norm, value.relative_change)
    dtypes = (value.dtype_a, value.dtype_b)
    return row("value", value.key, value.outcome, *dtypes, shape, *counts, *sizes, *norms, value.detail)


def _module_lines(node: ModuleChange, parent: str) -> Iterator[str]:
    name = f"{parent}.{node.name}" if parent and node.name else parent or node.name
    counts = (node.tensors, node.moved, node.only_in_a, node.only_in_b, node.elements, node.changed)
    yield row("module", name, "frozen" if node.is_frozen else "changed", *counts, node.relative_change)
    for child in node.children:
        yield from _module_lines(child, name)


def drift_lines(drifts: Sequence[Drift]) -> Iterator[str]:
    """Yield one line for each of several comparisons with one base."""
    for drift in drifts:
        result = "error" if drift.error else {True: "same", False: "different", None: "unknown"}[drift.same]
        counts = (drift.tensors, drift.moved, drift.structure)
        sizes = (drift.max_abs, drift.relative_change, drift.cosine, drift.most_changed)
        trained = (drift.progress.epoch, drift.progress.global_step)
        yield row("drift", drift.path, result, *counts, *sizes, *trained, drift.error)


def _compact(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)
