"""Gather a view that does not lie row-major, in flat memory whatever its size.

A small stretch of storage is read once and indexed. A large one is gathered in blocks of the result; each block is
filled tile by tile in the order of the file, so that a transposed matrix is read in strips and not element by element.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.sources import CHUNK_BYTES, ByteSource
from ckptool.model.values import TensorSpec
from ckptool.operations.cast_kernels import Array

BLOCK_BYTES = 16 << 20  # what is held of the result, or of the storage; a larger one means fewer, longer strips
_TILE_BYTES = 1 << 20
_GAP_BYTES = 4096  # reading over a page that nobody asked for costs less than another system call

_UNITS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}

Sizes = tuple[int, ...]
Box = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class _View:
    """Hold a view with as few dimensions as it has; sizes, strides and the offset count elements."""

    sizes: Sizes
    strides: Sizes
    offset: int
    itemsize: int

    @property
    def span_bytes(self) -> int:
        """Count the bytes from the first element to the end of the last."""
        steps = ((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return (sum(steps) + 1) * self.itemsize


def gather(spec: TensorSpec, first: int = 0) -> Iterator[Array]:
    """Yield the bytes of a view with at least one element, row-major from element ``first`` on, as uint8 arrays.

    The arrays are at most ``CHUNK_BYTES`` long, and each is valid until the next one is asked for.

    :raises UnreadableCheckpoint: the file ended early or changed, or its bytes do not match their checksum.
    """
    view = _View(*_collapse(spec.shape, spec.stride), spec.offset, spec.dtype.itemsize)
    gather_blocks = _gather_small if view.span_bytes <= BLOCK_BYTES else _gather_large
    skip = first * view.itemsize
    for block in gather_blocks(view, spec.storage.source, skip):
        data = block.reshape(-1).view(np.uint8)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _collapse(shape: Sizes, stride: Sizes) -> tuple[Sizes, Sizes]:
    """Drop dimensions of size 1 and merge neighbours that one stride covers."""
    merged: list[tuple[int, int]] = []
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step:
            size *= merged.pop()[0]
        merged.append((size, step))
    return tuple(size for size, _ in merged), tuple(step for _, step in merged)


def _gather_small(view: _View, source: ByteSource, skip: int) -> Iterator[Array]:
    """Read the stretch that the view spans, then yield boxes of it."""
    data = np.empty(view.span_bytes, np.uint8)
    place = 0
    for chunk in source.stream(view.offset * view.itemsize, view.span_bytes):
        data[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
        place += len(chunk)
    elements = _strided(data, view.sizes, view.strides, view.itemsize)
    for box, late in _boxes_from(view, skip, CHUNK_BYTES):
        yield np.ascontiguousarray(elements[box]).reshape(-1).view(np.uint8)[late:]


def _gather_large(view: _View, source: ByteSource, skip: int) -> Iterator[Array]:
    """Fill one block of the result after the other; the block is used again."""
    room = np.empty(BLOCK_BYTES, np.uint8)
    scratch = np.empty(_TILE_BYTES, np.uint8)
    with _random_access(view, source) as storage:
        for box, late in _boxes_from(view, skip, BLOCK_BYTES):
            block = room[: math.prod(_sizes(box)) * view.itemsize]
            _fill(block.view(_UNITS[view.itemsize]).reshape(_sizes(box)), view, box, storage, scratch)
            yield block[late:]


def _strided(data: Array, sizes: Sizes, strides: Sizes, itemsize: int) -> Array:
    """See bytes as elements; sizes and strides count elements."""
    steps = tuple(stride * itemsize for stride in strides)
    return as_strided(data[: len(data) // itemsize * itemsize].view(_UNITS[itemsize]), sizes, steps, writeable=False)


def _boxes_from(view: _View, skip: int, limit: int) -> Iterator[tuple[Box, int]]:
    """Yield row-major boxes of at most ``limit`` bytes, without the first ``skip`` bytes.

    The second value counts the bytes of the box that are to be left out still.
    """
    for box in _boxes(view.sizes, lambda sizes: math.prod(sizes) * view.itemsize <= limit):
        nbytes = math.prod(_sizes(box)) * view.itemsize
        if skip < nbytes:
            yield box, skip
        skip = max(0, skip - nbytes)


def _boxes(sizes: Sizes, fits: Callable[[Sizes], bool]) -> Iterator[Box]:
    """Cut an index space along its leading dimensions into boxes that fit; one element always does."""
    axis = next(axis for axis in range(len(sizes) + 1) if fits((1,) * axis + sizes[axis:]))
    if axis == 0:
        yield tuple(slice(0, size) for size in sizes)
        return
    whole = tuple(slice(0, size) for size in sizes[axis:])
    step = _largest_step(sizes, axis - 1, fits)
    for lead in itertools.product(*map(range, sizes[: axis - 1])):
        fixed = tuple(slice(index, index + 1) for index in lead)
        for start in range(0, sizes[axis - 1], step):
            yield (*fixed, slice(start, min(start + step, sizes[axis - 1])), *whole)


def _largest_step(sizes: Sizes, axis: int, fits: Callable[[Sizes], bool]) -> int:
    step = sizes[axis]
    while not fits((1,) * axis + (step,) + sizes[axis + 1 :]):
        step = (step + 1) // 2
    return step


@dataclass(frozen=True, slots=True)
class _Storage:
    """Read anywhere in the stretch that a view spans: element ``e`` of it lies at ``start + e * itemsize``."""

    fd: int
    start: int
    label: str

    def read_into(self, target: memoryview, place: int) -> None:
        """Fill ``target`` from ``place`` bytes into the stretch on."""
        try:
            count = os.preadv(self.fd, [target], self.start + place)
        except OSError as error:
            raise UnreadableCheckpoint(
                f"{self.label}: it cannot be read ({error.strerror}); get the file again"
            ) from error
        if count != len(target):
            raise UnreadableCheckpoint(f"{self.label}: the file ended early; get the file again")


@contextmanager
def _random_access(view: _View, source: ByteSource) -> Iterator[_Storage]:
    """Open the stretch that a view spans: where it lies in the file, or in a temporary copy of computed bytes."""
    start = view.offset * view.itemsize
    if source.file_range is None:
        with _spooled(source, start, view.span_bytes) as fd:
            yield _Storage(fd, 0, source.label)
    else:
        _check(source, start)
        yield _Storage(source.file_range.fd, source.file_range.offset + start, source.label)
        _check(source, start)


def _check(source: ByteSource, start: int) -> None:
    """Have the source check its checksum, and that its file did not change: it does before any partial read."""
    for _ in source.stream(start, 1):
        pass


@contextmanager
def _spooled(source: ByteSource, start: int, nbytes: int) -> Iterator[int]:
    """Copy a stretch to a file without a name; give its descriptor."""
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            for chunk in source.stream(start, nbytes):
                copy.write(chunk)
        except OSError as error:
            raise UnreadableCheckpoint(
                f"{source.label}: {nbytes} bytes cannot be copied to {tempfile.gettempdir()} ({error.strerror}); "
                "set TMPDIR to a folder with room for them"
            ) from error
        yield copy.fileno()


def _fill(block: Array, view: _View, box: Box, storage: _Storage, scratch: Array) -> None:
    """Gather one box of a view into ``block``, tile by tile in the order of the file."""
    order = sorted(range(len(box)), key=lambda axis: -view.strides[axis])
    strides = tuple(view.strides[axis] for axis in order)
    filled = block.transpose(order)
    corner = _place(box, view.strides)
    for tile in _boxes(filled.shape, lambda sizes: _Strips.of(sizes, strides, view.itemsize).nbytes <= _TILE_BYTES):
        strips = _Strips.of(_sizes(tile), strides, view.itemsize)
        filled[tile] = strips.read(storage, corner + _place(tile, strides), scratch)


def _sizes(box: Box) -> Sizes:
    return tuple(part.stop - part.start for part in box)


def _place(box: Box, strides: Sizes) -> int:
    """Count the elements of storage before the first one of a box."""
    return sum(part.start * stride for part, stride in zip(box, strides, strict=True))


@dataclass(frozen=True, slots=True)
class _Strips:
    """Say how a tile, its dimensions in the order of the file, is read: equal strips of storage, back to back.

    The first ``far`` dimensions count strips; the others lie within one, with gaps that are read over.
    """

    sizes: Sizes
    strides: Sizes
    far: int
    length: int
    itemsize: int

    @classmethod
    def of(cls, sizes: Sizes, strides: Sizes, itemsize: int) -> _Strips:
        """Put as many dimensions into a strip as have small gaps."""
        length, far = 1, len(sizes)
        while far and (sizes[far - 1] == 1 or (strides[far - 1] - length) * itemsize <= _GAP_BYTES):
            far -= 1
            length += (sizes[far] - 1) * strides[far]
        return cls(sizes, strides, far, length, itemsize)

    @property
    def nbytes(self) -> int:
        """Count the bytes of all strips together."""
        return math.prod(self.sizes[: self.far]) * self.length * self.itemsize

    def read(self, storage: _Storage, corner: int, scratch: Array) -> Array:
        """Give the elements of the tile whose first one lies at element ``corner``, over ``scratch``."""
        buffer, nbytes = scratch.data, self.length * self.itemsize
        for index, place in enumerate(self._places(corner)):
            storage.read_into(buffer[index * nbytes : (index + 1) * nbytes], place * self.itemsize)
        counts = itertools.accumulate(reversed(self.sizes[1 : self.far]), operator.mul, initial=self.length)
        packed = tuple(counts)[::-1] if self.far else ()
        return _strided(scratch, self.sizes, (*packed, *self.strides[self.far :]), self.itemsize)

    def _places(self, corner: int) -> list[int]:
        """List where the strips begin, in elements."""
        places = np.array([corner])
        for size, stride in zip(self.sizes[: self.far], self.strides[: self.far], strict=True):
            places = (places[:, None] + np.arange(size) * stride).reshape(-1)
        listed: list[int] = places.tolist()
        return listed
