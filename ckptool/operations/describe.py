"""Describe a checkpoint: what it holds, what it would become, what to beware of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import translate
from typing import Any, NamedTuple

from ckptool.errors import CkptoolError, PlanRefused, UnreadableCheckpoint
from ckptool.layouts import plan_keys, read_training, select
from ckptool.model import dtypes
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import (
    DTypeShare,
    Inspection,
    InspectOptions,
    KeySummary,
    Safety,
    SortOrder,
    StateDictSummary,
    TensorRow,
    Verdict,
)
from ckptool.model.plans import KeyMove, KeyPlan, Note, Selection, StateDict
from ckptool.model.rows import make_rows
from ckptool.model.sources import NoProgress, Progress
from ckptool.model.training import FACT_TABLES, Fact, Training
from ckptool.model.values import GlobalUse, OpaqueTensor, TensorSpec, walk
from ckptool.operations.advice import next_step
from ckptool.operations.disk_use import disk_use
from ckptool.operations.module_tree import fold, grow
from ckptool.operations.plain import to_plain
from ckptool.operations.preview import preview
from ckptool.operations.special import special_tensors

Tensor = TensorSpec | OpaqueTensor

# Buffers of torch.nn and transformers that no optimizer trains.
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "position_ids"})
_MAX_EXAMPLES = 3

_ORDERS: Mapping[SortOrder, Callable[[TensorRow], Any]] = {
    "name": lambda row: row.key or row.source_key,
    "size": lambda row: -row.nbytes,
    "dtype": lambda row: row.dtype,
    "shape": lambda row: (-len(row.shape or ()), tuple(-length for length in row.shape or ())),
}


class _Named(NamedTuple):
    """Know a tensor by its clean name (None: dropped) and by its name in the file."""

    key: str | None
    source: str
    tensor: Tensor


def describe(
    checkpoint: Checkpoint, options: InspectOptions | None = None, progress: Progress | None = None
) -> Inspection:
    """Say what a checkpoint is, without reading a tensor (but with ``statistics``: every one that is shown).

    A state dict that cannot be chosen, or keys that cannot be planned, are findings here and no errors.

    :raises ChecksumMismatch: values were read, and are not those that were written.
    """
    options = options or InspectOptions()
    selection = select(checkpoint, options.weights)
    plan, keys = _plan(selection, options)
    named = _named(checkpoint, selection, plan)
    rows = _rows(named)
    tied = {candidate: _tied(candidate.tensors) for candidate in selection.candidates}
    clean = [row for row in rows if row.key is not None]
    tree = grow(clean)
    training = _plain(read_training(checkpoint, selection))
    safety = judge(checkpoint.globals)
    return Inspection(
        path=str(checkpoint.path),
        format=checkpoint.format,
        file_bytes=checkpoint.file_bytes,
        facts=checkpoint.facts,
        metadata=checkpoint.metadata,
        producer=selection.producer,
        disk=disk_use(checkpoint, selection.candidates),
        state_dicts=tuple(_summarise(candidate, names, selection) for candidate, names in tied.items()),
        keys=keys,
        training=training,
        hyper_parameters=to_plain(training.hyper_parameters),
        ties=_ties(tied.get(selection.chosen, ()) if selection.chosen else (), named),
        safety=safety,
        architecture=preview(clean, tree, not checkpoint.is_safetensors) if plan else None,
        notes=_notes(checkpoint, selection, plan),
        next=next_step(checkpoint, selection, keys, safety),
        tensors=_listed(rows, named, options, progress or NoProgress()) if options.lists_tensors else None,
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
    facts: dict[str, Any] = {name: _plain_fact(fact) for name, fact in named.items() if isinstance(fact, Fact)}
    for name in FACT_TABLES:
        facts[name] = {key: _plain_fact(fact) for key, fact in named[name].items()}
    return replace(training, **facts)


def _plain_fact(fact: Fact) -> Fact:
    return Fact(to_plain(fact.value), fact.evidence)


def _plan(selection: Selection, options: InspectOptions) -> tuple[KeyPlan | None, KeySummary]:
    if selection.chosen is None:
        return None, KeySummary(None, refusal=selection.refusal)
    try:
        plan = plan_keys(selection.chosen, selection.producer, options.keys)
    except PlanRefused as refused:
        return None, KeySummary(None, refusal=Note(refused.code, str(refused)))
    renamed = [move for move in plan.moves if move.target not in (None, move.source)]
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
    found: dict[str | tuple[str, ...], KeyMove] = {}
    for move in renamed:
        target = move.target or ""
        lost = move.source[: -len(target)] if move.source.endswith(target) else _lost(move.source, target)
        if lost not in found:
            found[lost] = move
            if len(found) == _MAX_EXAMPLES:
                break
    return tuple(found.values())


def _lost(source: str, target: str) -> tuple[str, ...]:
    kept = set(target.split("."))
    return tuple([segment for segment in source.split(".") if segment not in kept])


def _named(checkpoint: Checkpoint, selection: Selection, plan: KeyPlan | None) -> list[_Named]:
    """Name the tensors of the chosen state dict; where none is chosen, every tensor of the file by its place."""
    if selection.chosen is None:
        return list(_by_place(checkpoint))
    tensors = selection.chosen.tensors
    if plan is None:
        return make_rows(_Named, tensors, tensors, tensors.values())
    moves = plan.moves if len(tensors) == len(plan.moves) else [move for move in plan.moves if move.source in tensors]
    return make_rows(_Named, [move.target for move in moves], tensors, tensors.values())


def _rows(named: Sequence[_Named]) -> list[TensorRow]:
    keys, sources, tensors = zip(*named, strict=True) if named else ((), (), ())
    shapes = [tensor.shape for tensor in tensors]
    sizes = [tensor.nbytes for tensor in tensors]
    return make_rows(TensorRow, keys, sources, map(_dtype_name, tensors), shapes, sizes, [None] * len(named))


def _by_place(checkpoint: Checkpoint) -> Iterator[_Named]:
    for path, value in walk(checkpoint.root):
        if isinstance(value, TensorSpec | OpaqueTensor):
            place = "".join(path).removeprefix(".")
            yield _Named(place, place, value)


def _dtype_name(tensor: Tensor) -> str:
    dtype = tensor.dtype
    if isinstance(tensor, TensorSpec):
        return tensor.dtype.name
    return " ".join(filter(None, (tensor.kind, tensor.detail, dtype.name if dtype else "")))


def _listed(
    rows: Sequence[TensorRow], named: Sequence[_Named], options: InspectOptions, progress: Progress
) -> tuple[TensorRow, ...]:
    listed = list(_wanted(rows, options))
    if options.statistics:
        tensors = {name.source: name.tensor for name in named}
        progress.start("reading values", sum(row.nbytes for row in listed))
        listed = [_with_statistics(row, tensors[row.source_key], progress) for row in listed]
    if options.sort != "file":
        listed.sort(key=_ORDERS[options.sort])
    return tuple(listed)


def _with_statistics(row: TensorRow, tensor: Tensor, progress: Progress) -> TensorRow:
    if not isinstance(tensor, TensorSpec):
        return row
    from ckptool.operations.statistics import tensor_statistics

    statistics = tensor_statistics(tensor)
    progress.advance(row.nbytes)
    return row._replace(statistics=statistics)


def _wanted(rows: Sequence[TensorRow], options: InspectOptions) -> Sequence[TensorRow]:
    if not options.include and not options.exclude:
        return rows
    matches = [_matcher(globs) for globs in (options.include, options.exclude)]
    included, excluded = matches
    names = [row.key or row.source_key for row in rows]
    return [
        row
        for row, name in zip(rows, names, strict=True)
        if (not options.include or included(name)) and not (options.exclude and excluded(name))
    ]


def _matcher(globs: Iterable[str]) -> Callable[[str], Any]:
    return re.compile("|".join(map(translate, globs))).match


def _summarise(candidate: StateDict, tied: Sequence[tuple[str, ...]], selection: Selection) -> StateDictSummary:
    tensors = candidate.tensors
    shares = _dtype_shares(tensors.values())
    repeated = {name for names in tied for name in names[1:]}
    text = "\n".join(tensors)
    buffers = {name for name in _BUFFERS if name in text}  # of most state dicts, none
    trained = [
        tensor.shape
        for key, tensor in tensors.items()
        if key not in repeated and not (buffers and key.rpartition(".")[2] in buffers) and tensor.shape is not None
    ]
    return StateDictSummary(
        path=candidate.name,
        role=candidate.role,
        selected=candidate is selection.chosen,
        reason=candidate.reason,
        tensors=len(tensors),
        parameters=sum([count * math.prod(shape) for shape, count in Counter(trained).items()]),
        elements=sum([share.elements for share in shares]),
        nbytes=sum([share.nbytes for share in shares]) - sum([tensors[key].nbytes for key in repeated]),
        dtypes=shares,
    )


def _tied(tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Group the names of the very same tensor; an empty tensor is only itself."""
    storages = [id(tensor.storage) for tensor in tensors.values() if isinstance(tensor, TensorSpec)]
    if len(set(storages)) == len(storages):
        return []
    shared = {storage for storage, count in Counter(storages).items() if count > 1}
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, TensorSpec) and id(tensor.storage) in shared and tensor.numel:
            groups.setdefault(tensor.view_key, []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _ties(tied: Iterable[tuple[str, ...]], named: Iterable[_Named]) -> tuple[tuple[str, ...], ...]:
    """Give tied names as they will be, without those that go."""
    clean = {name.source: name.key for name in named} if tied else {}
    groups = [tuple([key for key in map(clean.get, names) if key is not None]) for names in tied]
    return tuple([names for names in groups if len(names) > 1])


def _dtype_shares(tensors: Iterable[Tensor]) -> tuple[DTypeShare, ...]:
    """Sum up by element type; tensors of one type and shape are counted before they are multiplied."""
    alike = Counter(
        [
            (tensor.dtype.name, tensor.shape, None)
            if type(tensor) is TensorSpec
            else (_dtype_name(tensor), tensor.shape, _opaque_bytes(tensor))
            for tensor in tensors
        ]
    )
    groups: dict[str, list[int]] = {}
    for (name, shape, opaque_bytes), count in alike.items():
        elements = 0 if shape is None else math.prod(shape)
        nbytes = elements * dtypes.BY_NAME[name].itemsize if opaque_bytes is None else opaque_bytes
        group = groups.setdefault(name, [0, 0, 0])
        group[0] += count
        group[1] += count * elements
        group[2] += count * nbytes
    shares = [DTypeShare(name, *counts) for name, counts in groups.items()]
    return tuple(sorted(shares, key=lambda share: -share.nbytes))


def _opaque_bytes(tensor: Tensor) -> int | None:
    """Give the size in bytes of what is no dense array; None where dtype and shape tell it."""
    return None if isinstance(tensor, TensorSpec) else tensor.nbytes


def _notes(checkpoint: Checkpoint, selection: Selection, plan: KeyPlan | None) -> tuple[Note, ...]:
    found = [Note(finding.code, finding.text) for finding in checkpoint.findings]
    return (*found, *selection.notes, *(plan.notes if plan else ()))
