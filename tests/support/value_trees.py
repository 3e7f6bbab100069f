"""Value trees and checkpoints built by hand: what a reader would have made of the same objects."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptool.model.checkpoint import Checkpoint
from ckptool.model.dtypes import BY_NAME
from ckptool.model.plans import StateDict
from ckptool.model.sources import FileRange
from ckptool.model.values import DictNode, GlobalRef, SetNode, Storage, Stub, TensorSpec


@dataclass(frozen=True)
class MemorySource:
    """Serve bytes out of memory; ``None`` stands for bytes that nobody may ask for."""

    data: bytes | None
    label: str = "memory"
    crc32: int | None = None
    file_range: FileRange | None = None

    @property
    def nbytes(self) -> int:
        return len(self.data or b"")

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        assert self.data is not None, "a layout has no business with the values of weights"
        end = len(self.data) if nbytes is None else offset + nbytes
        yield memoryview(self.data)[offset:end]


def spec(*shape: int, dtype: str = "float32", data: bytes | None = None) -> TensorSpec:
    """Describe a contiguous tensor on a storage of its own."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    storage = Storage("0", MemorySource(data), step * BY_NAME[dtype].itemsize)
    return TensorSpec(BY_NAME[dtype], tuple(shape), tuple(reversed(strides)), 0, storage)


def scalar(value: float) -> TensorSpec:
    """Describe a float32 tensor of one element, with its value."""
    return spec(data=struct.pack("<f", value))


def node(mapping: Mapping[Any, Any], type_name: str = "dict") -> DictNode:
    """Turn nested plain mappings into ``DictNode``."""
    return DictNode([(key, tree(value)) for key, value in mapping.items()], type_name)


def tree(value: Any) -> Any:
    """Turn a plain object into a value tree."""
    if isinstance(value, Mapping):
        return node(value)
    if isinstance(value, list | tuple):
        return type(value)(tree(item) for item in value)
    return SetNode([tree(item) for item in value], "set") if isinstance(value, set) else value


def stub(name: str, *args: Any, **fields: Any) -> Stub:
    """Stand in for an object of the class ``module.name`` with these instance attributes."""
    module, _, last = name.rpartition(".")
    return Stub(GlobalRef(module, last, "unknown"), args=args, state=node(fields) if fields else None)


def weights(keys: Iterable[str]) -> dict[str, TensorSpec]:
    """Give every key a 2x2 tensor of its own."""
    return {key: spec(2, 2) for key in keys}


def state_dict(keys: Iterable[str], role: Any = "main") -> StateDict:
    """Make a state dict at the root, of 2x2 tensors."""
    return StateDict((), role, weights(keys))


class NoFile:
    """Stand in for the open file of a checkpoint that has none."""

    def close(self) -> None:
        """Do nothing."""


def checkpoint(root: Any, container: str = "torch-zip") -> Checkpoint:
    """Make a checkpoint of a plain object."""
    return Checkpoint(Path("made.pt"), container, 0, tree(root), NoFile())
