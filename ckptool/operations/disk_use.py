"""Add up what takes the space of a checkpoint file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from ckptool.layouts import node_at
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import DiskUse
from ckptool.model.plans import Role, StateDict
from ckptool.model.values import DictNode, Storage, TensorSpec, children

Group = Literal["weights", "ema", "optimizer", "other"]

_GROUPS: tuple[Group, ...] = ("weights", "ema", "optimizer", "other")
_GROUP_OF_ROLE: dict[Role, Group] = {"main": "weights", "peer": "weights", "raw": "weights", "ema": "ema"}


def disk_use(checkpoint: Checkpoint, candidates: Iterable[StateDict]) -> DiskUse:
    """Split the bytes of a file between its state dicts, its optimizer and the rest."""
    tally = _Tally()
    for state_dict in sorted(candidates, key=lambda candidate: candidate.role == "ema"):
        tally.visit_entries(state_dict, node_at(checkpoint.root, state_dict.path))
    tally.visit(checkpoint.root, "other")
    counted = tally.count_bytes()
    stored = {*tally.storages(), *checkpoint.storages}
    hidden = sum([storage.nbytes for storage in stored]) - sum(counted.values())
    named = counted["weights"] + counted["ema"] + counted["optimizer"]
    rest = max(checkpoint.file_bytes - named - hidden, 0)
    return DiskUse(counted["weights"], counted["ema"], counted["optimizer"], rest, hidden)


@dataclass(slots=True)
class _Tally:
    """Collect the tensors of every group; the first group to show a storage owns it."""

    seen: set[int] = field(default_factory=set)
    shown: dict[Group, list[TensorSpec]] = field(default_factory=lambda: {group: [] for group in _GROUPS})

    def visit_entries(self, state_dict: StateDict, node: Any) -> None:
        """Visit a state dict, and spare the walk through the whole file the way through its ``node``."""
        group = _GROUP_OF_ROLE[state_dict.role]
        specs = [value for value in state_dict.entries.values() if type(value) is TensorSpec]
        self.shown[group] += specs
        if len(specs) < len(state_dict.entries):
            for value in state_dict.entries.values():
                self.visit(None if type(value) is TensorSpec else value, group)
        if isinstance(node, DictNode) and len(node) == len(state_dict.entries):
            self.seen.add(id(node))
            self.visit(node.attributes, group)

    def visit(self, root: Any, group: Group) -> None:
        stack = [(root, group)]
        while stack:
            value, group = stack.pop()
            if id(value) in self.seen:
                continue
            if type(value) is TensorSpec:
                self.shown[group].append(value)
                continue
            self.seen.add(id(value))
            if isinstance(value, DictNode) and "state" in value and "param_groups" in value:
                group = "optimizer"
            stack.extend((child, group) for _, child in children(value) if not isinstance(child, _PLAIN))

    def storages(self) -> list[Storage]:
        """List the storages of all tensors, one for each tensor."""
        return [spec.storage for specs in self.shown.values() for spec in specs]

    def count_bytes(self) -> dict[Group, int]:
        """Count the bytes that the tensors of each group show."""
        storages = self.storages()
        if len(set(storages)) == len(storages):
            return {group: _count_apart(specs) for group, specs in self.shown.items()}
        counted: dict[Group, int] = dict.fromkeys(_GROUPS, 0)
        owner: dict[Storage, Group] = {}
        views: dict[Storage, list[TensorSpec]] = {}
        for group, specs in self.shown.items():
            for spec in specs:
                owner.setdefault(spec.storage, group)
                views.setdefault(spec.storage, []).append(spec)
        for storage, specs in views.items():
            counted[owner[storage]] += _covered(storage, specs)
        return counted


def _count_apart(specs: list[TensorSpec]) -> int:
    """Count the bytes that tensors show which share no storage; nearly always, each is the whole of its own."""
    stored = [spec.storage.nbytes for spec in specs]
    if [spec.nbytes for spec in specs] == stored and all(map(attrgetter("is_contiguous"), specs)):
        return sum(stored)
    return sum([_covered(spec.storage, [spec]) for spec in specs])


_PLAIN = (str, int, float, bool, type(None))


def _covered(storage: Storage, specs: list[TensorSpec]) -> int:
    """Count the bytes of a storage that its views show; views with gaps are taken as disjoint from all others."""
    ranges: list[tuple[int, int]] = []
    scattered: dict[tuple[Any, ...], int] = {}
    for spec in specs:
        start, end, distinct = _extent(spec)
        if distinct == end - start:
            ranges.append((start, end))
        else:
            scattered[spec.view_key] = distinct
    return min(storage.nbytes, _union(ranges) + sum(scattered.values()))


def _extent(spec: TensorSpec) -> tuple[int, int, int]:
    """Give the first byte, the byte after the last, and how many distinct bytes a view can show between them."""
    itemsize = spec.dtype.itemsize
    if not spec.numel:
        return 0, 0, 0
    span = 1
    distinct = 1
    for length, stride in zip(spec.shape, spec.stride, strict=True):
        span += (length - 1) * stride
        distinct *= length if stride else 1
    start = spec.offset * itemsize
    return start, start + span * itemsize, min(distinct, span) * itemsize


def _union(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in _merged(sorted(ranges)))


def _merged(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    current: tuple[int, int] | None = None
    for start, end in ranges:
        if current is None or start > current[1]:
            if current is not None:
                yield current
            current = (start, end)
        else:
            current = (current[0], max(current[1], end))
    if current is not None:
        yield current
