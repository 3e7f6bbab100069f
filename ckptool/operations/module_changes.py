"""Fold what happened to tensors into the tree of modules: which layers moved, and which were frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckptool.model.comparison import Comparison, DTypeChange, KindChange, ModuleChange, ValueChange
from ckptool.model.inspection import TensorRow
from ckptool.operations.module_tree import Branch, follow_chain, grow, is_number
from ckptool.operations.pairing import Tensors
from ckptool.operations.tables import elements_of


def fold_changes(a: Tensors, b: Tensors, found: Comparison) -> ModuleChange:
    """Sum up by module, in the order of A; neighbours with consecutive numbers and no change become one node."""
    everything = {**a, **b}
    rows = [TensorRow(name, name, "", tensor.shape, 0) for name, tensor in everything.items()]
    return _fold("", grow(rows), _Leaves(a, b, found))


class _Leaves:
    """Make the leaf of any name."""

    def __init__(self, a: Tensors, b: Tensors, found: Comparison) -> None:
        self._a, self._b = a, b
        self._values: Mapping[str, ValueChange] = found.by_key
        self._moved = _keys(found.changed) | _keys(found.shape) | _keys(found.dtype)

    def make(self, segment: str, row: TensorRow) -> ModuleChange:
        """Describe one tensor; ``segment`` is what its name ends with."""
        name = row.source_key
        value = self._values.get(name)
        weight = None if value is None or value.is_counter else value
        return ModuleChange(
            name=segment,
            tensors=1,
            moved=int(name in self._moved),
            only_in_a=int(name not in self._b),
            only_in_b=int(name not in self._a),
            elements=elements_of(row.shape),
            changed=(value.changed or 0) if value else 0,
            change_norm=(weight.change_norm or 0.0) if weight else 0.0,
            weight_norm=(weight.weight_norm or 0.0) if weight else 0.0,
            key=name,
            broken=(value.broken or 0) if value else 0,
        )


def _keys(changes: Iterable[ValueChange | KindChange | DTypeChange]) -> set[str]:
    return {change.key for change in changes}


def _fold(name: str, branch: Branch, leaves: _Leaves) -> ModuleChange:
    name, branch = follow_chain(name, branch)
    below = [_fold(segment, child, leaves) for segment, child in branch.below.items()]
    own = [leaves.make(name, branch.leaf)] if branch.leaf is not None else []
    if own and not below:
        return own[0]
    return _sum(name, (*own, *below), tuple(_merge_frozen((*own, *below))))


def _sum(name: str, parts: Sequence[ModuleChange], children: tuple[ModuleChange, ...]) -> ModuleChange:
    return ModuleChange(
        name=name,
        tensors=sum(part.tensors for part in parts),
        moved=sum(part.moved for part in parts),
        only_in_a=sum(part.only_in_a for part in parts),
        only_in_b=sum(part.only_in_b for part in parts),
        elements=sum(part.elements for part in parts),
        changed=sum(part.changed for part in parts),
        change_norm=math.hypot(*(part.change_norm for part in parts)),
        weight_norm=math.hypot(*(part.weight_norm for part in parts)),
        broken=sum(part.broken for part in parts),
        children=children,
    )


def _merge_frozen(nodes: Iterable[ModuleChange]) -> Iterator[ModuleChange]:
    """Join runs of numbered neighbours below which nothing differs."""
    run: list[ModuleChange] = []
    for node in nodes:
        if run and not _continues(run[-1], node):
            yield _joined(run)
            run = []
        run.append(node)
    if run:
        yield _joined(run)


def _continues(one: ModuleChange, other: ModuleChange) -> bool:
    both_frozen = one.is_frozen and other.is_frozen
    return both_frozen and is_number(one.name) and other.name == str(int(one.name) + 1)


def _joined(run: list[ModuleChange]) -> ModuleChange:
    if len(run) == 1:
        return run[0]
    return _sum(f"[{run[0].name}-{run[-1].name}]", run, ())
