"""One part of a distributed tensor: a file of torch.save within a file, opened when its bytes are asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.dcp_metadata import Box
from ckptool.formats.file import InnerFile, InputFile
from ckptool.formats.sources import MemorySource, StoredRange
from ckptool.formats.torch_zip import read_torch_zip
from ckptool.formats.zip import read_archive
from ckptool.model.dtypes import DType
from ckptool.model.sources import ByteSource
from ckptool.model.values import TensorSpec, row_major

_LARGEST_GATHERED = 4 << 30
_LETTERS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class _Opened(NamedTuple):
    """Hold the source of a part's row-major bytes, where in it they begin, and what is read for it."""

    source: ByteSource
    start: int
    stored: ByteSource


class StoredPart:
    """Give the row-major bytes of a part (see ``ByteSource``)."""

    __slots__ = ("_box", "_dtype", "_file", "_name", "_opened")

    def __init__(self, file: InputFile, name: str, box: Box, dtype: DType) -> None:
        self._file = file
        self._name = name
        self._box = box
        self._dtype = dtype
        self._opened: _Opened | None = None

    @property
    def label(self) -> str:
        """Name the file, the tensor, and where in it the part begins."""
        return f"{self._file.path}: {self._item}"

    @property
    def _item(self) -> str:
        return f"{self._name!r:.100} at {list(self._box.offsets)}"

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""
        return math.prod(self._box.sizes) * self._dtype.itemsize

    @property
    def crc32(self) -> int | None:
        """Give the checksum that is stored for the part, where it is that of its bytes."""
        source, start, _ = self._open()
        return source.crc32 if start == 0 and source.nbytes == self.nbytes else None

    @property
    def parts(self) -> tuple[ByteSource, ...]:
        """Give what is read for it, and checked, in whatever order its elements lie."""
        return (self._open().stored,)

    @property
    def file_range(self) -> None:
        """Say that where the bytes lie is known only when the part is opened."""
        return None

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        source, start, _ = self._open()
        return source.stream(start + offset, self.nbytes - offset if nbytes is None else nbytes)

    def _open(self) -> _Opened:
        """Find the bytes, once.

        :raises UnreadableCheckpoint: the item is damaged, or not the part that the metadata promises.
        """
        if self._opened is None:
            try:
                self._opened = self._read()
            except UnreadableCheckpoint as error:
                error.args = (f"{self.label}: {error}",)
                raise
        return self._opened

    def _read(self) -> _Opened:
        inner = InnerFile(self._file, self._box.place.offset, self._box.place.nbytes)
        found = read_torch_zip(inner, read_archive(inner))
        foreign = [use for use in found.globals if use.ref.severity != "safe"]
        if foreign:
            error = UnreadableCheckpoint(
                f"it names {foreign[0].ref.full_name!r:.100}, which no tensor needs; do not trust it"
            )
            error.globals = tuple(foreign)
            raise error
        return self._checked(found.root)

    def _checked(self, spec: object) -> _Opened:
        if not isinstance(spec, TensorSpec) or (spec.dtype, spec.shape) != (self._dtype, self._box.sizes):
            raise UnreadableCheckpoint(
                f"it does not hold the {self._dtype.name} tensor of {list(self._box.sizes)} that the metadata promises;"
                " get all files again, from one save"
            )
        if 0 in spec.stride or spec.conj or spec.neg or (spec.storage.big_endian and spec.dtype.swap_size > 1):
            raise UnreadableCheckpoint("its bytes are not the values themselves; save it anew from plain tensors")
        source = spec.storage.source
        if isinstance(source, StoredRange):
            source.name = self._item
        if not spec.is_contiguous:
            return _Opened(_gather(spec, self.label), 0, source)
        return _Opened(source, spec.offset * spec.dtype.itemsize, source)


def _gather(spec: TensorSpec, label: str) -> ByteSource:
    """Read a part whose elements lie in another order (channels last, transposed) into memory, and order them."""
    if max(spec.nbytes, spec.storage.nbytes) > _LARGEST_GATHERED:
        raise UnreadableCheckpoint("it is too large to be brought into row-major order; save it contiguous")
    data = b"".join(map(bytes, spec.storage.source.stream()))
    unit = min(spec.dtype.itemsize, 8)
    halves = spec.dtype.itemsize // unit
    elements = memoryview(data)[: len(data) // unit * unit].cast(_LETTERS[unit])
    ordered = memoryview(bytearray(spec.nbytes)).cast(_LETTERS[unit])
    axis = max(range(len(spec.shape)), key=spec.shape.__getitem__)
    others = [range(1) if index == axis else range(size) for index, size in enumerate(spec.shape)]
    target_strides = row_major(spec.shape)
    length, step, target_step = spec.shape[axis], spec.stride[axis] * halves, target_strides[axis] * halves
    for lead in itertools.product(*others):
        first = (spec.offset + _place(lead, spec.stride)) * halves
        target = _place(lead, target_strides) * halves
        for half in range(halves):
            run = elements[first + half : first + half + (length - 1) * step + 1 : step]
            ordered[target + half : target + half + (length - 1) * target_step + 1 : target_step] = run
    return MemorySource(label, ordered.cast("B"))


def _place(indices: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(index * stride for index, stride in zip(indices, strides, strict=True))
