"""Describe a checkpoint: what it holds, what it would become, what to beware of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ckptool.errors import CkptoolError, PlanRefused, UnreadableCheckpoint, UnsupportedTensor
from ckptool.layouts import plan_keys, read_training, select
from ckptool.layouts.segments import wanted_by
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import (
    Architecture,
    Inspection,
    InspectOptions,
    KeySummary,
    Safety,
    SortOrder,
    TensorRow,
    Verdict,
)
from ckptool.model.plans import KeyMove, KeyPlan, Note, Selection
from ckptool.model.rows import make_rows
from ckptool.model.sources import NoProgress, Progress
from ckptool.model.training import FACT_TABLES, Fact, Training
from ckptool.model.values import GlobalUse, TensorSpec
from ckptool.operations.advice import next_step
from ckptool.operations.disk_use import disk_use
from ckptool.operations.module_tree import fold, grow
from ckptool.operations.plain import plain_fact, to_plain
from ckptool.operations.preview import preview
from ckptool.operations.special import special_tensors
from ckptool.operations.tables import Table, Tensor, by_place, summarise, tabulate, tied_names

_MAX_EXAMPLES = 3

_ORDERS: Mapping[SortOrder, Callable[[TensorRow], Any]] = {
    "name": lambda row: row.key or row.source_key,
    "size": lambda row: -row.nbytes,
    "dtype": lambda row: row.dtype,
    "shape": lambda row: (-len(row.shape or ()), tuple(-length for length in row.shape or ())),
}


def describe(
    checkpoint: Checkpoint, options: InspectOptions | None = None, progress: Progress | None = None
) -> Inspection:
    """Say what a checkpoint is, without reading a tensor (but with ``statistics``: every one that is shown).

    A state dict that cannot be chosen, or keys that cannot be planned, are findings here and no errors.

    :raises ChecksumMismatch: values were read, and are not those that were written.
    :raises UnsupportedTensor: values were to be read, and a tensor expands far beyond its storage.
    """
    options = options or InspectOptions()
    selection = select(checkpoint, options.weights)
    chosen = selection.chosen
    plan, keys = _plan(selection, options)
    tables = {candidate: tabulate(candidate.tensors) for candidate in selection.candidates}
    table = tabulate(by_place(checkpoint)) if chosen is None else tables[chosen]
    rows = _rows(table, plan)
    tied = {candidate: tied_names(table) for candidate, table in tables.items()}
    clean = [row for row in rows if row.key is not None]
    training = _plain(read_training(checkpoint, selection))
    safety = judge(checkpoint.globals)
    architecture = _architecture(clean, not checkpoint.is_safetensors) if plan and options.architecture else None
    return Inspection(
        path=str(checkpoint.path),
        format=checkpoint.format,
        file_bytes=checkpoint.file_bytes,
        facts=checkpoint.facts,
        metadata=checkpoint.metadata,
        producer=selection.producer,
        disk=disk_use(checkpoint, selection.candidates),
        state_dicts=tuple(
            summarise(candidate, table, tied[candidate], selected=candidate is chosen)
            for candidate, table in tables.items()
        ),
        keys=keys,
        training=training,
        hyper_parameters=to_plain(training.hyper_parameters),
        ties=_ties(() if chosen is None else tied[chosen], rows),
        safety=safety,
        architecture=architecture,
        notes=(*_notes(checkpoint, selection, plan), *_match_notes(architecture)),
        next=next_step(checkpoint, selection, keys, safety),
        tensors=_listed(checkpoint.path, rows, table, options, progress or NoProgress()),
        tree=fold(grow(_wanted(clean, options))) if options.tree else None,
        shards=checkpoint.shards,
        not_dense=special_tensors(checkpoint, selection, plan),
    )


def judge(uses: Sequence[GlobalUse]) -> Safety:
    """Give the verdict of the worst global that a pickle names."""
    severities = {use.ref.severity for use in uses}
    verdict: Verdict = "dangerous" if "dangerous" in severities else "unknown" if "unknown" in severities else "clean"
    return Safety(verdict, tuple(uses))


def judge_refused(error: CkptoolError) -> Safety:
    """Judge what a pickle named before its file turned out to be unreadable, which is never clean."""
    safety = judge(error.globals if isinstance(error, UnreadableCheckpoint) else ())
    return safety if safety.verdict == "dangerous" else Safety("unknown", safety.globals)


def _plain(training: Training) -> Training:
    """Bring every value that a file states into plain words; the hyperparameters stay as they are."""
    named = {field.name: getattr(training, field.name) for field in fields(training)}
    facts: dict[str, Any] = {name: plain_fact(fact) for name, fact in named.items() if isinstance(fact, Fact)}
    for name in FACT_TABLES:
        facts[name] = {key: plain_fact(fact) for key, fact in named[name].items()}
    return replace(training, **facts)


def _plan(selection: Selection, options: InspectOptions) -> tuple[KeyPlan | None, KeySummary]:
    if selection.chosen is None:
        return None, KeySummary(None, refusal=selection.refusal)
    try:
        plan = plan_keys(selection.chosen, selection.producer, options.keys)
    except PlanRefused as refused:
        return None, KeySummary(None, refusal=Note(refused.code, str(refused)))
    renamed = [move for move in plan.moves if move[0] != move[1] and move[1] is not None]
    return plan, KeySummary(
        already_clean=plan.already_clean,
        certainty=plan.certainty,
        wrappers=plan.wrappers,
        renamed=len(renamed),
        examples=_examples(renamed),
        dropped=plan.dropped,
    )


def _examples(renamed: Iterable[KeyMove]) -> tuple[KeyMove, ...]:
    """Take the first key for each distinct way of losing segments."""
    found: list[KeyMove] = []
    left = list(renamed)
    while left and len(found) < _MAX_EXAMPLES:
        source, target = left[0].source, left[0].target or ""
        found.append(left[0])
        front = source.removesuffix(target)
        if front != source:
            left = [move for move in left if move[0] != front + (move[1] or "")]
        else:
            lost = _lost(source, target)
            left = [move for move in left if _lost(move.source, move.target or "") != lost]
    return tuple(found)


def _lost(source: str, target: str) -> tuple[str, ...]:
    kept = set(target.split("."))
    return tuple([segment for segment in source.split(".") if segment not in kept])


def _rows(table: Table, plan: KeyPlan | None) -> list[TensorRow]:
    """Give each tensor its clean name (None: dropped); without a plan, the one that it has."""
    keys: Sequence[str | None] = table.sources
    if plan is not None:
        moves = plan.moves
        if len(moves) > len(table.sources):  # values that are no tensors have their moves, too
            tensors = set(table.sources)
            moves = tuple([move for move in moves if move.source in tensors])
        keys = [move.target for move in moves]
    return make_rows(
        TensorRow, keys, table.sources, table.dtypes, table.shapes, table.sizes, [None] * len(table.sources)
    )


def _listed(
    path: Path, rows: Sequence[TensorRow], table: Table, options: InspectOptions, progress: Progress
) -> tuple[TensorRow, ...] | None:
    if not options.lists_tensors:
        return None
    listed = list(_wanted(rows, options))
    if options.statistics:
        tensors = dict(zip(table.sources, table.tensors, strict=True))
        progress.start("reading values", sum(row.nbytes for row in listed))
        try:
            listed = [_with_statistics(row, tensors[row.source_key], progress) for row in listed]
        except UnsupportedTensor as error:
            error.args = (f"{path}: {error}",)
            raise
    if options.sort != "file":
        listed.sort(key=_ORDERS[options.sort])
    return tuple(listed)


def _with_statistics(row: TensorRow, tensor: Tensor, progress: Progress) -> TensorRow:
    if not isinstance(tensor, TensorSpec):
        return row
    from ckptool.operations.statistics import tensor_statistics

    statistics = tensor_statistics(tensor, key=row.key or row.source_key)
    progress.advance(row.nbytes)
    return row._replace(statistics=statistics)


def _wanted(rows: Sequence[TensorRow], options: InspectOptions) -> Sequence[TensorRow]:
    if not options.include and not options.exclude:
        return rows
    is_wanted = wanted_by(options.include, options.exclude)
    return [row for row in rows if is_wanted(row.key or row.source_key)]


def _ties(tied: Iterable[tuple[str, ...]], rows: Iterable[TensorRow]) -> tuple[tuple[str, ...], ...]:
    """Give tied names as they will be, without those that go."""
    clean = {row.source_key: row.key for row in rows} if tied else {}
    groups = [tuple([key for key in map(clean.get, names) if key is not None]) for names in tied]
    return tuple([names for names in groups if len(names) > 1])


def _architecture(rows: Sequence[TensorRow], in_order: bool) -> Architecture | None:
    sketch = preview(rows, in_order)
    if sketch is None:
        return None
    from ckptool.operations.architectures import recognise  # the only one that reads the index

    return recognise(sketch, rows)


def _match_notes(architecture: Architecture | None) -> Iterator[Note]:
    """Say what tells architectures apart that have the same names and shapes, and how their names are reached."""
    match = None if architecture is None else architecture.match
    if match is None or match.kind != "exact":
        return
    if match.differences:
        reason = "without the prefix, the names are those of that architecture"
        yield Note("architecture-prefix", f"strip-prefixes --like {match.name} takes it off: {reason}")
    if match.alternatives:
        number = len(match.alternatives) + 1
        text = f"{number} architectures have these names and shapes: stride, pooling, dropout and image size, in which "
        yield Note("architecture-twins", f"{text}they may differ, are not in the weights")


def _notes(checkpoint: Checkpoint, selection: Selection, plan: KeyPlan | None) -> tuple[Note, ...]:
    found = [Note(finding.code, finding.text) for finding in checkpoint.findings]
    return (*found, *selection.notes, *(plan.notes if plan else ()))
