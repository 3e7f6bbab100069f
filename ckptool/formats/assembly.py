"""One tensor out of its parts: boxes of it that lie in several files, put together row by row while they are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptool.errors import IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.formats.sources import cut
from ckptool.model.sources import CHUNK_BYTES, ByteSource, range_end

BLOCK_BYTES = 2 << 20  # what is held of the result while parts lie side by side in it
_MOST_OPEN = 32  # parts that are read at once; each holds a chunk
_NARROW_BYTES = 48  # a strip of fewer bytes is copied column by column: a slice costs as much as copying some hundred

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Place one box of a tensor: where it begins, its size, and the source of its bytes, row-major from ``base`` on.

    The last dimension counts bytes.
    """

    offsets: Sizes
    sizes: Sizes
    source: ByteSource
    base: int = 0

    @property
    def ends(self) -> Sizes:
        """Give the first index behind it in each dimension."""
        return tuple(map(sum, zip(self.offsets, self.sizes, strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class AssembledSource:
    """Give the row-major bytes of a tensor that is put together from parts which cover it exactly."""

    label: str
    shape: Sizes
    boxes: tuple[Part, ...]
    crc32: None = None
    file_range: None = None

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[ByteSource, ...]:
        """Give the sources of the parts: reading all of this reads all of each, and checks it."""
        return tuple(box.source for box in self.boxes)

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        end = range_end(self, offset, nbytes)
        if offset == end:
            return iter(())
        return cut(_assemble(self.shape, self.boxes), offset, end - offset)


def assemble(label: str, shape: Sizes, itemsize: int, parts: Sequence[tuple[Sizes, Sizes, ByteSource]]) -> ByteSource:
    """Put a tensor together from (offsets, sizes, source) of its parts, all counted in elements.

    :raises IncompleteCheckpoint: they leave some of it out.
    :raises UnreadableCheckpoint: one reaches beyond it, or two overlap.
    """
    _require_cover(shape, parts)
    boxes = tuple(Part((*offsets, 0), (*sizes, itemsize), source) for offsets, sizes, source in parts)
    whole, merged = _merge((*shape, itemsize), boxes)
    return AssembledSource(label, whole, tuple(sorted(merged, key=lambda box: box.offsets)))


# --- do they cover it? ---


def _require_cover(shape: Sizes, parts: Sequence[tuple[Sizes, Sizes, ByteSource]]) -> None:
    for offsets, sizes, source in parts:
        if not len(offsets) == len(sizes) == len(shape) or not _is_inside(shape, offsets, sizes):
            raise UnreadableCheckpoint(
                f"{source.label}: a part of {list(sizes)} at {list(offsets)} reaches beyond the tensor of"
                f" {list(shape)}; save the checkpoint again"
            )
    _require_disjoint(shape, parts)
    covered = sum(math.prod(sizes) for _, sizes, _ in parts)
    if covered != math.prod(shape):
        raise IncompleteCheckpoint(
            f"its parts hold {covered:,} of {math.prod(shape):,} elements; get the files of all ranks, from one save"
        )


def _is_inside(shape: Sizes, offsets: Sizes, sizes: Sizes) -> bool:
    return all(start >= 0 and start + size <= end for end, start, size in zip(shape, offsets, sizes, strict=True))


def _require_disjoint(shape: Sizes, parts: Sequence[tuple[Sizes, Sizes, ByteSource]]) -> None:
    """Sweep along the dimension that parts them most, and compare each part with those that it lies beside."""
    axis = max(range(len(shape)), key=lambda axis: len({offsets[axis] for offsets, _, _ in parts}), default=None)
    beside: list[tuple[Sizes, Sizes]] = []
    for offsets, sizes, source in sorted(parts, key=lambda part: part[0][axis] if axis is not None else 0):
        if axis is not None:
            beside = [other for other in beside if other[0][axis] + other[1][axis] > offsets[axis]]
        if any(_overlap(offsets, sizes, *other) for other in beside):
            raise UnreadableCheckpoint(
                f"{source.label}: a part of {list(sizes)} at {list(offsets)} overlaps another;"
                " save the checkpoint again"
            )
        beside.append((offsets, sizes))


def _overlap(offsets: Sizes, sizes: Sizes, others: Sizes, other_sizes: Sizes) -> bool:
    sides = zip(offsets, sizes, others, other_sizes, strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in sides)


# --- the bytes ---


def _merge(shape: Sizes, boxes: Sequence[Part]) -> tuple[Sizes, list[Part]]:
    """Join every dimension that all boxes fill with the one before it: rows that are split nowhere are one stretch."""
    merged = list(boxes)
    for axis in range(len(shape) - 1, 0, -1):
        if all(box.sizes[axis] == shape[axis] for box in merged):
            width = shape[axis]
            merged = [
                Part(_join(box.offsets, axis, width), _join(box.sizes, axis, width), box.source, box.base)
                for box in merged
            ]
            shape = _join(shape, axis, width)
    return shape, merged


def _join(sizes: Sizes, axis: int, width: int) -> Sizes:
    return (*sizes[: axis - 1], sizes[axis - 1] * width, *sizes[axis + 1 :])


def _assemble(shape: Sizes, boxes: Sequence[Part]) -> Iterator[memoryview]:
    """Yield the bytes of a tensor whose last dimension counts bytes; its boxes are sorted by their offsets."""
    row_bytes = math.prod(shape[1:])
    if len(shape) == 1:
        for box in boxes:
            yield from box.source.stream(box.base, box.sizes[0])
    elif row_bytes > BLOCK_BYTES:
        for index in range(shape[0]):
            yield from _assemble(*_sorted(*_merge(shape[1:], [_row(box, index) for box in boxes if _has(box, index)])))
    else:
        yield from _assemble_rows(shape, boxes, max(1, BLOCK_BYTES // row_bytes))


def _assemble_rows(shape: Sizes, boxes: Sequence[Part], step: int) -> Iterator[memoryview]:
    """Yield ``step`` rows at a time, in one block of memory that is used again."""
    row_bytes = math.prod(shape[1:])
    block, room = (memoryview(bytearray(min(step, shape[0]) * row_bytes)) for _ in range(2))
    readers = [_Reader(box, stays_open=len(boxes) <= _MOST_OPEN) for box in boxes]
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        for box, reader in zip(boxes, readers, strict=True):
            first, end = max(start, box.offsets[0]), min(start + rows, box.ends[0])
            if first < end:
                data = reader.read_into(room[: (end - first) * math.prod(box.sizes[1:])])
                _scatter(data, (end - first, *box.sizes[1:]), block, shape, (first - start, *box.offsets[1:]))
        for place in range(0, rows * row_bytes, CHUNK_BYTES):
            yield block[place : min(place + CHUNK_BYTES, rows * row_bytes)]


class _Reader:
    """Read a box from its beginning to its end, some rows at a time.

    One that stays open reads the whole in one stream, which checks its checksum on the way, and holds a chunk of it.
    """

    def __init__(self, box: Part, *, stays_open: bool) -> None:
        self._source = box.source
        self._place = box.base
        self._chunks = box.source.stream(box.base, math.prod(box.sizes)) if stays_open else None
        self._rest = memoryview(b"")

    def read_into(self, target: memoryview) -> memoryview:
        """Fill ``target`` with the next bytes, and give it."""
        chunks = self._chunks or self._source.stream(self._place, len(target))
        self._place += len(target)
        filled = 0
        while filled < len(target):
            self._rest = self._rest or next(chunks)
            taken = self._rest[: len(target) - filled]
            target[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._rest = self._rest[len(taken) :]
        return target


def _sorted(shape: Sizes, boxes: list[Part]) -> tuple[Sizes, list[Part]]:
    return shape, sorted(boxes, key=lambda box: box.offsets)


def _has(box: Part, index: int) -> bool:
    return box.offsets[0] <= index < box.ends[0]


def _row(box: Part, index: int) -> Part:
    skipped = (index - box.offsets[0]) * math.prod(box.sizes[1:])
    return Part(box.offsets[1:], box.sizes[1:], box.source, box.base + skipped)


def _scatter(data: memoryview, sizes: Sizes, block: memoryview, shape: Sizes, corner: Sizes) -> None:
    """Copy a box of ``sizes`` to its ``corner`` in a block of ``shape``: strip by strip, or by column if narrow."""
    rows, width = sizes[-2:]
    pitch = shape[-1]
    for count, lead in enumerate(itertools.product(*map(range, sizes[:-2]))):
        place = 0
        for index, (step, size) in enumerate(zip(corner, shape, strict=True)):
            place = place * size + step + (lead[index] if index < len(lead) else 0)
        plane = data[count * rows * width : (count + 1) * rows * width]
        if width < _NARROW_BYTES and rows > width:
            end = place + (rows - 1) * pitch + 1
            for column in range(width):
                block[place + column : end + column : pitch] = plane[column::width]
        else:
            for row in range(rows):
                block[place + row * pitch : place + row * pitch + width] = plane[row * width : (row + 1) * width]
