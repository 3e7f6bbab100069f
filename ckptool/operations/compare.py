"""Say what changed between two checkpoints: names, then shapes and dtypes, then bytes, then numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptool.errors import CkptoolError, PlanRefused
from ckptool.formats import open_checkpoint
from ckptool.layouts import read_training
from ckptool.layouts.segments import quoted, wanted_by
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.comparison import (
    CompareOptions,
    Comparison,
    DTypeChange,
    KindChange,
    Progressed,
    TensorName,
    ValueChange,
    severity,
)
from ckptool.model.plans import KeyOptions, Note
from ckptool.model.sources import NoProgress, Progress
from ckptool.operations.fact_changes import compare_entries, compare_metadata
from ckptool.operations.module_changes import fold_changes
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.pairing import Tensors, by_common_names, dtype_name, find_view
from ckptool.operations.renames import find_renames
from ckptool.operations.tables import elements_of
from ckptool.operations.tensor_pairs import Finding, Pair, Tolerance, compare_kinds, compare_pairs

_OUTCOMES = ("changed", "unknown", "close", "same")


def compare_files(
    path_a: Path, path_b: Path, options: CompareOptions | None = None, progress: Progress | None = None
) -> Comparison:
    """Compare two files, A the base; ``path_b`` is read as far as that takes, no further.

    :raises CkptoolError: one of them cannot be read or compared; the message names it.
    """
    with open_checkpoint(path_a) as a, open_checkpoint(path_b) as b:
        return compare(a, b, options, progress)


def compare(
    a: Checkpoint, b: Checkpoint, options: CompareOptions | None = None, progress: Progress | None = None
) -> Comparison:
    """Compare what the options mean in two open checkpoints.

    :raises PlanRefused: which weights are meant, or what their clean names are, is open.
    :raises UnreadableCheckpoint: bytes cannot be read, or do not match their checksum.
    :raises UnsupportedTensor: a tensor expands far beyond its storage.
    """
    options, progress = options or CompareOptions(), progress or NoProgress()
    views = _views(a, b, options)
    try:
        return _compare(views, options, progress)
    except CkptoolError as error:
        if not any(str(checkpoint.path) in str(error) for checkpoint in (a, b)):
            error.args = (f"{a.path} and {b.path}: {error}",)
        raise


@dataclass(frozen=True, slots=True)
class _Views:
    """Hold what is compared, and the notes on how it was found."""

    a: OpenedCheckpoint
    b: OpenedCheckpoint
    notes: tuple[Note, ...]


def _views(a: Checkpoint, b: Checkpoint, options: CompareOptions) -> _Views:
    keys = replace(
        options.keys, include=(), exclude=(), keep_prefixes=options.keys.keep_prefixes or options.exact_names
    )
    # Explicit names lead from A to B.
    asked = keys, replace(keys, mapping=None, rename=(), add_prefix="")
    found = [
        find_view(OpenedCheckpoint(checkpoint), options.weights, wanted)
        for checkpoint, wanted in zip((a, b), asked, strict=True)
    ]
    elsewhere = [
        (view.weights, view.keys) != (options.weights, wanted) for view, wanted in zip(found, asked, strict=True)
    ]
    if all(elsewhere):  # neither has it: say so as a command on one file would
        _ = OpenedCheckpoint(a, options.weights, keys).plan
    notes = [_fallback(view, options) for view, moved in zip(found, elsewhere, strict=True) if moved]
    return _Views(found[0], found[1], tuple(notes))


def _fallback(view: OpenedCheckpoint, options: CompareOptions) -> Note:
    wanted = (("--weights", options.weights), ("--select", options.keys.select), ("--prefix", options.keys.prefix))
    taken = view.weights, view.keys.select, view.keys.prefix
    given_up = [f"{option} {text}" for (option, text), kept in zip(wanted, taken, strict=True) if text != kept]
    return Note("fallback", f"{view.checkpoint.path}: has nothing for {', '.join(given_up)}; taken as it is")


def _compare(views: _Views, options: CompareOptions, progress: Progress) -> Comparison:
    a, b, common_notes = _named(views)
    a, b = _filtered(a, b, options.keys)
    pairs = [Pair(name, tensor, b[name]) for name, tensor in a.items() if name in b]
    only_a = {name: tensor for name, tensor in a.items() if name not in b}
    only_b = {name: tensor for name, tensor in b.items() if name not in a}
    if options.values:
        findings = compare_pairs(pairs, Tolerance(options.rtol, options.atol), progress)
        renamed, ambiguous = find_renames(only_a, only_b, progress)
    else:
        findings, renamed, ambiguous = compare_kinds(pairs), (), ()
        common_notes += (Note("values-unread", "names, shapes and dtypes were compared; no value was read"),)
    values = tuple(sorted((each for each in findings if isinstance(each, ValueChange)), key=_rank))
    found = Comparison(
        path_a=str(views.a.checkpoint.path),
        path_b=str(views.b.checkpoint.path),
        options=options,
        names=tuple(pair.key for pair in pairs),
        identical=sum(finding is None for finding in findings) if options.values else 0,
        only_in_a=_names(only_a, {rename.a for rename in renamed}),
        only_in_b=_names(only_b, {rename.b for rename in renamed}),
        shape=tuple(each for each in findings if isinstance(each, KindChange)),
        dtype=tuple(_dtype_changes(pairs, findings)),
        values=values,
        renamed=renamed,
        ambiguous=ambiguous,
        entries=compare_entries(views.a, views.b, progress),
        metadata=compare_metadata(views.a, views.b, progress) if options.metadata else None,
        wrappers_a=views.a.plan.wrappers,
        wrappers_b=views.b.plan.wrappers,
        notes=tuple(dict.fromkeys((*views.notes, *_notes(views.a), *_notes(views.b), *common_notes))),
        progress_a=_progressed(views.a),
        progress_b=_progressed(views.b),
        format_a=views.a.checkpoint.format,
        format_b=views.b.checkpoint.format,
    )
    return replace(found, tree=fold_changes(a, b, found)) if options.tree else found


def _named(views: _Views) -> tuple[Tensors, Tensors, tuple[Note, ...]]:
    """Give the tensors by the names under which they are compared, and how those came about."""
    a, b = views.a.tensors, views.b.tensors
    if views.a.keys.keep_prefixes or not a or not b:
        return a, b, ()
    reached = by_common_names(views.a, views.b)
    if (len(reached[0]), len(reached[1])) == (len(a), len(b)) and reached[0].keys() & reached[1].keys():
        moved = reached[0].keys() != a.keys() or reached[1].keys() != b.keys()
        note = Note("reference", "no name was common: the names of one file were brought to those of the other")
        return *reached, (note,) if moved else _wrapper_note(views)
    return a, b, ()


def _wrapper_note(views: _Views) -> tuple[Note, ...]:
    """Say what was taken off where the names in the files differ, and the compared ones do not."""
    raw = views.a.state_dict.tensors.keys(), views.b.state_dict.tensors.keys()
    if raw[0] == raw[1] or views.a.tensors.keys() != views.b.tensors.keys():
        return ()
    segments = [[wrapper.segment for wrapper in view.plan.wrappers if wrapper.segment] for view in (views.a, views.b)]
    ours, theirs = set(segments[0]) - set(segments[1]), set(segments[1]) - set(segments[0])
    removed = sorted(ours | theirs) or sorted({*segments[0], *segments[1]})
    if not removed:
        return ()
    return (Note("wrapper", f"the names are the same after removing {', '.join(f'`{name}`' for name in removed)}"),)


def _filtered(a: Tensors, b: Tensors, keys: KeyOptions) -> tuple[Tensors, Tensors]:
    """Keep what the globs ask for, by clean name.

    :raises PlanRefused: nothing is included.
    """
    if not keys.include and not keys.exclude:
        return a, b
    is_wanted = wanted_by(keys.include, keys.exclude)
    kept = [{name: tensor for name, tensor in tensors.items() if is_wanted(name)} for tensors in (a, b)]
    if not any(kept):
        raise PlanRefused("not-found", "no clean name is left by --include and --exclude: see inspect --tensors")
    return kept[0], kept[1]


def _names(tensors: Tensors, renamed: set[str]) -> tuple[TensorName, ...]:
    return tuple(
        TensorName(name, dtype_name(tensor), tensor.shape, elements_of(tensor.shape))
        for name, tensor in tensors.items()
        if name not in renamed
    )


def _dtype_changes(pairs: Sequence[Pair], findings: Sequence[Finding]) -> Iterator[DTypeChange]:
    survived = {"same": True, "close": False, "changed": False, "unknown": None}
    for pair, finding in zip(pairs, findings, strict=True):
        ours, theirs = dtype_name(pair.a), dtype_name(pair.b)
        if ours != theirs:
            known = survived[finding.outcome] if isinstance(finding, ValueChange) else None
            yield DTypeChange(pair.key, ours, theirs, known)


def _rank(value: ValueChange) -> tuple[object, ...]:
    """Order by how much changed, the most first, and counters last."""
    sizes = [severity(number) for number in (value.relative_change, value.max_abs)]
    return _OUTCOMES.index(value.outcome), value.is_counter, *((-worst, -number) for worst, number in sizes)


def _notes(view: OpenedCheckpoint) -> tuple[Note, ...]:
    findings = (Note(finding.code, finding.text) for finding in view.checkpoint.findings)
    found = [*findings, *view.selection.notes, *view.plan.notes]
    if view.plan.dropped:
        dropped = [move.source for move in view.plan.dropped]
        reasons = ", ".join(dict.fromkeys(move.reason for move in view.plan.dropped))
        found.append(Note("dropped", f"{len(dropped)} keys are not compared: {quoted(dropped)} ({reasons})"))
    return tuple(Note(note.code, f"{view.checkpoint.path}: {note.text}") for note in found)


def _progressed(view: OpenedCheckpoint) -> Progressed:
    training = read_training(view.checkpoint, view.selection)
    counts = [fact.value if fact is not None else None for fact in (training.epoch, training.global_step)]
    return Progressed(*(count if type(count) is int else None for count in counts))
