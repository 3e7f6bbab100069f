"""Compare what stands beside the tensors, value by value: hyperparameters, training facts, text metadata, entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptool.errors import CkptoolError
from ckptool.layouts import read_training
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.comparison import FactChange, Group
from ckptool.model.plans import Selection
from ckptool.model.sources import Progress
from ckptool.model.training import CARRIED_HYPER_PARAMETERS, CARRIED_TRAINING
from ckptool.operations.facts import facts_said
from ckptool.operations.nested import differing_tensors
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.plain import to_plain
from ckptool.operations.sharding import folder_of
from ckptool.operations.suggest import read_config

# What says no more than how a file is written, or is read as training facts already.
_NOT_COMPARED = frozenset({"format", CARRIED_TRAINING, CARRIED_HYPER_PARAMETERS})
_ABSENT = object()
_CYCLE = "holds itself"


def compare_metadata(a: OpenedCheckpoint, b: OpenedCheckpoint, progress: Progress) -> tuple[FactChange, ...]:
    """List the facts that differ, those of hyperparameters first, in the order of A.

    :raises CkptoolError: a tensor among them cannot be read.
    """
    ours, theirs = read_training(a.checkpoint, a.selection), read_training(b.checkpoint, b.selection)
    settings = ours.hyper_parameters, theirs.hyper_parameters
    return (
        *_compare_values("hyper_parameters", "", settings, progress),
        *_plain_changes("training", "", facts_said(ours), facts_said(theirs)),
        *_plain_changes("metadata", "", _text(a.checkpoint, a.selection), _text(b.checkpoint, b.selection)),
        *_config_changes(folder_of(a.checkpoint), folder_of(b.checkpoint)),
    )


def _config_changes(a: Path, b: Path) -> Sequence[FactChange]:
    """Compare what lies beside the files; one that is alone belongs to a folder, not to the file in it."""
    paths = a / "config.json", b / "config.json"
    if not all(path.exists() for path in paths):
        return ()
    try:
        return tuple(_plain_changes("config", "", *map(_read, paths)))
    except RecursionError as error:
        raise CkptoolError(f"{paths[0]}: nested too deeply to be compared; leave --metadata out") from error


def _read(path: Path) -> Mapping[str, Any]:
    config = read_config(path)
    if config is None:
        raise CkptoolError(
            f"{path}: cannot be read as a JSON object, so nothing can be said of it; leave --metadata out"
        )
    return config


def compare_entries(a: OpenedCheckpoint, b: OpenedCheckpoint, progress: Progress) -> tuple[FactChange, ...]:
    """List what differs among the entries of both state dicts that are no tensors (``_extra_state``, plain numbers).

    :raises CkptoolError: a tensor among them cannot be read.
    """
    ours, theirs = _entries(a), _entries(b)
    return tuple(
        change
        for name in dict.fromkeys((*ours, *theirs))
        for change in _compare_values("entry", name, (ours.get(name, _ABSENT), theirs.get(name, _ABSENT)), progress)
    )


def _compare_values(group: Group, path: str, values: tuple[Any, Any], progress: Progress) -> Iterator[FactChange]:
    """Yield the places at which two value trees differ, tensors inside them included.

    :raises CkptoolError: a tensor cannot be read.
    """
    plain = tuple(_ABSENT if value is _ABSENT else to_plain(value) for value in values)
    yield from _plain_changes(group, path, *plain)
    if _ABSENT not in values:
        for place in differing_tensors(*values, progress):
            yield FactChange(group, f"{path}{place}".removeprefix("."), "both", "other values", "other values")


def _entries(opened: OpenedCheckpoint) -> Mapping[str, Any]:
    entries = opened.state_dict.entries
    tensors = opened.state_dict.tensors
    if len(tensors) == len(entries):
        return {}
    kept = opened.plan.kept
    return {kept[key]: value for key, value in entries.items() if key in kept and key not in tensors}


def _text(checkpoint: Checkpoint, selection: Selection) -> Mapping[str, str]:
    """Give the text metadata without what describes the file itself: the names of tied tensors among it."""
    names = selection.chosen.tensors if selection.chosen is not None else {}
    return {key: text for key, text in checkpoint.metadata.items() if key not in _NOT_COMPARED and text not in names}


def _plain_changes(group: Group, path: str, a: Any, b: Any) -> Iterator[FactChange]:
    """Walk two plain values (``operations/plain.py``) side by side."""
    ours, theirs = dict(_leaves(a)), dict(_leaves(b))
    for place in dict.fromkeys((*ours, *theirs)):
        before, after = ours.get(place, _ABSENT), theirs.get(place, _ABSENT)
        written = f"{path}{''.join(place)}".removeprefix(".")
        if before is _ABSENT:
            yield FactChange(group, written, "b", None, after)
        elif after is _ABSENT:
            yield FactChange(group, written, "a", before, None)
        elif not _are_equal(before, after):
            yield FactChange(group, written, "both", before, after)


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values that hold no others, with the steps that lead there; an empty container is one of them."""
    if isinstance(value, Mapping) and value and not _is_leaf(value):
        for key, child in value.items():
            yield from _leaves(child, (*place, f".{key}"))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from _leaves(child, (*place, f"[{index}]"))
    elif value is not _ABSENT and (place or value != {}):
        yield place, value


def _is_leaf(value: Mapping[str, Any]) -> bool:
    """Tell whether a mapping stands for one value that JSON has no word for."""
    first = next(iter(value))
    return first.startswith("$") and first != "$class"


def _are_equal(before: Any, after: Any) -> bool:
    """Compare plain values: 1 and 1.0 are one number, and True is none. What was cut off cannot be said to be equal."""
    if isinstance(before, Mapping) and before.get("$cut", _CYCLE) != _CYCLE:
        return False
    return bool(before == after) and isinstance(before, bool) == isinstance(after, bool)
