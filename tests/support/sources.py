"""Storages for tests: bytes in memory or in a file, with a checksum that is checked as a reader's would be."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from ckptool.errors import ChecksumMismatch
from ckptool.model.dtypes import BY_NAME
from ckptool.model.sources import FileRange
from ckptool.model.values import Storage, TensorSpec


class MemoryBytes:
    """Give bytes in chunks of an odd length, so that elements straddle them."""

    label = "memory"
    file_range: FileRange | None = None

    def __init__(self, data: bytes, crc32: int | None = None, chunk: int = 1021) -> None:
        self.data = data
        self.crc32 = crc32
        self.chunk = chunk
        self.nbytes = len(data)

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        end = self.nbytes if nbytes is None else offset + nbytes
        assert 0 <= offset <= end <= self.nbytes
        if self.crc32 is not None and zlib.crc32(self.data) != self.crc32:
            raise ChecksumMismatch("memory: its bytes do not match their stored checksum")
        for start in range(offset, end, self.chunk):
            yield memoryview(self.data)[start : min(start + self.chunk, end)]


class FileBytes(MemoryBytes):
    """The same bytes, which also lie in a file, ``lead`` bytes from its start."""

    def __init__(self, path: Path, data: bytes, crc32: int | None = None, lead: int = 0) -> None:
        super().__init__(data, crc32, chunk=1 << 20)
        path.write_bytes(b"\xee" * lead + data)
        self.file = path.open("rb")
        self.file_range = FileRange(self.file.fileno(), lead, len(data))

    def truncate(self, nbytes: int) -> None:
        os.truncate(self.file.name, nbytes)


def dense(source: MemoryBytes, dtype: str, *shape: int, **fields: object) -> TensorSpec:
    """Describe a contiguous tensor over a whole source."""
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return view(source, dtype, tuple(shape), tuple(stride[-len(shape) :]) if shape else (), **fields)


def view(
    source: MemoryBytes,
    dtype: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    *,
    big_endian: bool = False,
    conj: bool = False,
    neg: bool = False,
) -> TensorSpec:
    """Describe any view of a source."""
    storage = Storage("0", source, source.nbytes, big_endian=big_endian)
    return TensorSpec(BY_NAME[dtype], shape, stride, offset, storage, conj=conj, neg=neg)
