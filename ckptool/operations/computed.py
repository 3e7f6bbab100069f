"""Bytes that are computed while they are read: gathered, swapped, conjugated, negated, cast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ckptool.model.dtypes import DType
from ckptool.model.sources import range_end
from ckptool.model.values import TensorSpec
from ckptool.operations.cast_kernels import Array, cast_bytes
from ckptool.operations.casts import CastTally
from ckptool.operations.gather import gather

_PIECE_BYTES = 1 << 18  # small enough for the L2 cache to hold it with all that is made of it on the way


@dataclass(frozen=True, slots=True, eq=False)
class ComputedSource:
    """Give a view as row-major little-endian elements of ``target``, in flat memory (see ``ByteSource``)."""

    spec: TensorSpec
    target: DType
    tally: CastTally | None = None
    crc32: None = None
    file_range: None = None

    @property
    def label(self) -> str:
        """Name the place of the storage."""
        return self.spec.storage.source.label

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""
        return self.spec.numel * self.target.itemsize

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says; a whole pass fills the tally anew."""
        end = range_end(self, offset, nbytes)
        if offset == end:
            return
        tally = self.tally if end - offset == self.nbytes else None
        if tally is not None:
            tally.restart()
        yield from self._stream(offset, end, tally)

    def _stream(self, offset: int, end: int, tally: CastTally | None) -> Iterator[memoryview]:
        piece_bytes = self._piece * self.target.itemsize
        place = offset // piece_bytes * piece_bytes
        for before in self._pieces(place // self.target.itemsize):
            after = before if self.target == self.spec.dtype else cast_bytes(before, self.spec.dtype, self.target)
            if tally is not None:
                tally.add(before, after)
            yield after.data[max(0, offset - place) : end - place]
            place += len(after)
            if place >= end:
                return

    @property
    def _piece(self) -> int:
        """Count the elements that are computed together."""
        return _PIECE_BYTES // max(self.spec.dtype.itemsize, self.target.itemsize)

    def _pieces(self, first: int) -> Iterator[Array]:
        """Yield the elements from the given one on as they were meant: their own type, little-endian, dense."""
        spec = self.spec
        for piece in recut(_stored(spec, first), self._piece * spec.dtype.itemsize):
            swapped = _swap(piece, spec.dtype.swap_size) if spec.storage.big_endian else piece
            yield _flip_signs(swapped, spec) if spec.conj or spec.neg else swapped


def _stored(spec: TensorSpec, first: int) -> Iterable[memoryview | Array]:
    """Yield the bytes of the elements from the given one on, in row-major order, as they are stored."""
    if not spec.is_contiguous:
        return gather(spec, first)
    itemsize = spec.dtype.itemsize
    return spec.storage.source.stream((spec.offset + first) * itemsize, (spec.numel - first) * itemsize)


def recut(chunks: Iterable[memoryview | Array], size: int) -> Iterator[Array]:
    """Yield the same bytes as uint8 arrays of ``size``, the last one shorter."""
    rest = np.empty(0, np.uint8)
    for chunk in chunks:
        data = np.frombuffer(chunk, np.uint8)
        if len(rest):
            data = np.concatenate((rest, data))
        end = len(data) // size * size
        for start in range(0, end, size):
            yield data[start : start + size]
        rest = data[end:].copy()
    if len(rest):
        yield rest


def _swap(data: Array, size: int) -> Array:
    return data.view(f">u{size}").astype(f"<u{size}").view(np.uint8)


def _flip_signs(data: Array, spec: TensorSpec) -> Array:
    """Apply the lazy bits: a complex number is a pair of parts, and conjugation is the sign of the second."""
    size = spec.dtype.swap_size
    parts = data.view(f"<u{size}").reshape(-1, spec.dtype.itemsize // size).copy()
    sign = parts.dtype.type(1 << 8 * size - 1)
    if spec.neg and spec.dtype.kind == "int":
        np.negative(parts, out=parts)
    elif spec.neg:
        parts ^= sign
    if spec.conj and spec.dtype.kind == "complex":
        parts[:, 1] ^= sign
    flipped: Array = parts.reshape(-1).view(np.uint8)
    return flipped
