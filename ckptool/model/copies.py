"""Which bytes go where: the plan that a writer carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptool.model.dtypes import DType
from ckptool.model.sources import ByteSource


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Name ``nbytes`` bytes from ``offset`` on of a source (both in bytes)."""

    source: ByteSource
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """List the extents that, back to back, are the row-major little-endian bytes of one target storage."""

    dtype: DType
    numel: int
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""
        return sum(extent.nbytes for extent in self.extents)


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """Place one contiguous tensor on a payload; tied tensors name the same payload object."""

    dtype: DType
    shape: tuple[int, ...]
    payload: Payload


@dataclass(frozen=True, slots=True, eq=False)
class PlannedOpaque:
    """Write a tensor that is no dense array as it is: the fields of ``OpaqueTensor``, its dense parts planned."""

    kind: str
    detail: str
    dtype: DType | None
    shape: tuple[int, ...] | None
    parts: tuple[tuple[str, Any], ...]

    @property
    def nbytes(self) -> int:
        """Sum the dense parts in bytes."""
        return sum(part.payload.nbytes for _, part in self.parts if isinstance(part, PlannedTensor))


@dataclass(frozen=True, slots=True, eq=False)
class CopyPlan:
    """Say what a writer writes.

    ``tensors`` is the flat state dict by clean name, in order; tied names share one ``Payload`` object.
    ``aliases`` maps a name that a safetensors file leaves out to the name that holds its bytes. ``metadata``
    is the text metadata of a safetensors header. ``root`` is what a torch file pickles: a value tree whose
    tensors are ``PlannedTensor`` and ``PlannedOpaque``.
    """

    tensors: Mapping[str, PlannedTensor]
    root: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
