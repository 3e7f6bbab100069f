"""The tensors of a state dict by column, and what adds up in them: 50,000 of them are looked at a column at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import DTypeShare, StateDictSummary
from ckptool.model.plans import StateDict
from ckptool.model.values import OpaqueTensor, TensorSpec, walk

Tensor = TensorSpec | OpaqueTensor

# Buffers of torch.nn and transformers that no optimizer trains.
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "position_ids"})


class Table(NamedTuple):
    """Hold tensors by column: name in the file, tensor, what its elements are, shape, dense size in bytes."""

    sources: Sequence[str]
    tensors: Sequence[Tensor]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...] | None]
    sizes: Sequence[int]


def by_place(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name every tensor of a file by its place."""
    return {
        "".join(path).removeprefix("."): value
        for path, value in walk(checkpoint.root)
        if isinstance(value, TensorSpec | OpaqueTensor)
    }


def tabulate(tensors: Mapping[str, Tensor]) -> Table:
    """List tensors by column."""
    values = list(tensors.values())
    shapes = [tensor.shape for tensor in values]
    sizes = [tensor.nbytes for tensor in values]
    return Table(list(tensors), values, _dtype_names(values), shapes, sizes)


def _dtype_names(tensors: Sequence[Tensor]) -> list[str]:
    return [tensor.dtype.name if type(tensor) is TensorSpec else _opaque_name(tensor) for tensor in tensors]


def _opaque_name(tensor: Tensor) -> str:
    dtype = "" if tensor.dtype is None else tensor.dtype.name
    if isinstance(tensor, TensorSpec):
        return dtype
    return " ".join(filter(None, (tensor.kind, tensor.detail, dtype)))


def tied_names(table: Table) -> list[tuple[str, ...]]:
    """Group the names of the very same tensor; an empty tensor is only itself."""
    storages = [id(tensor.storage) for tensor in table.tensors if isinstance(tensor, TensorSpec)]
    if len(set(storages)) == len(storages):
        return []
    shared = {storage for storage, count in Counter(storages).items() if count > 1}
    groups: dict[Any, list[str]] = {}
    for name, tensor in zip(table.sources, table.tensors, strict=True):
        if isinstance(tensor, TensorSpec) and id(tensor.storage) in shared and tensor.numel:
            groups.setdefault(tensor.view_key, []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def summarise(
    candidate: StateDict, table: Table, tied: Sequence[tuple[str, ...]], *, selected: bool
) -> StateDictSummary:
    """Add up one state dict; ``tied`` are the groups of names of one tensor."""
    shares = _dtype_shares(table)
    repeated = {name for names in tied for name in names[1:]}
    return StateDictSummary(
        path=candidate.name,
        role=candidate.role,
        selected=selected,
        reason=candidate.reason,
        tensors=len(table.tensors),
        parameters=_count_elements(_trained_shapes(table, repeated)),
        elements=sum([share.elements for share in shares]),
        nbytes=sum(table.sizes) - _repeated_bytes(table, repeated),
        dtypes=shares,
    )


def _trained_shapes(table: Table, repeated: set[str]) -> Sequence[tuple[int, ...] | None]:
    """List the shapes without those of well-known buffers and of names that repeat a tensor."""
    text = "\n".join(table.sources)
    buffers = {name for name in _BUFFERS if name in text}  # of most state dicts, none
    if not buffers and not repeated:
        return table.shapes
    return [
        shape
        for name, shape in zip(table.sources, table.shapes, strict=True)
        if name not in repeated and name.rpartition(".")[2] not in buffers
    ]


def _count_elements(shapes: Sequence[tuple[int, ...] | None]) -> int:
    """Sum up; equal shapes are counted before they are multiplied."""
    return sum([count * elements_of(shape) for shape, count in Counter(shapes).items()])


def _repeated_bytes(table: Table, repeated: set[str]) -> int:
    if not repeated:
        return 0
    return sum([size for name, size in zip(table.sources, table.sizes, strict=True) if name in repeated])


def _dtype_shares(table: Table) -> tuple[DTypeShare, ...]:
    """Sum up by element type; tensors of one type, shape and size are counted first."""
    groups: dict[str, list[int]] = {}
    for (name, shape, nbytes), count in Counter(zip(table.dtypes, table.shapes, table.sizes, strict=True)).items():
        group = groups.setdefault(name, [0, 0, 0])
        group[0] += count
        group[1] += count * elements_of(shape)
        group[2] += count * nbytes
    shares = [DTypeShare(name, *counts) for name, counts in groups.items()]
    return tuple(sorted(shares, key=lambda share: -share.nbytes))


def elements_of(shape: tuple[int, ...] | None) -> int:
    """Count the elements of a tensor; 0 where its shape is not known."""
    return 0 if shape is None else math.prod(shape)
