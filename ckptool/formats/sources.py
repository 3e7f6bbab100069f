"""Where the bytes of a storage come from: a range of the file, an inflated record, memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from ckptool.errors import ChecksumMismatch, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.model.checksums import crc32
from ckptool.model.sources import CHUNK_BYTES, ByteSource, FileRange, range_end


class _FileSource:
    """Check ranges and checksums; the bytes themselves come from ``_read``."""

    __slots__ = ("_file", "_offset", "_verified", "crc32", "name", "nbytes")

    def __init__(self, file: InputFile, name: str, offset: int, nbytes: int, crc: int = 0) -> None:
        self._file = file
        self._offset = offset
        self._verified = False
        self.name = name
        self.nbytes = nbytes
        self.crc32 = crc or None  # torch.serialization.set_crc32_options(False) stores 0

    @property
    def label(self) -> str:
        """Name the file and the record."""
        return f"{self._file.path}: {self.name}"

    @property
    def file_range(self) -> FileRange | None:
        """Give the place in the file where these very bytes lie, or None where they are computed."""
        raise NotImplementedError

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        nbytes = range_end(self, offset, nbytes) - offset
        try:
            if nbytes == self.nbytes:
                yield from self._read_whole()
            elif nbytes:
                self._verify()
                yield from self._read(offset, nbytes)
        except UnreadableCheckpoint as error:
            raise type(error)(f"{self.label}: {error}") from error

    def _read(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        raise NotImplementedError

    def _read_whole(self) -> Iterator[memoryview]:
        if self.crc32 is None:
            yield from self._read(0, self.nbytes)
            return
        running, left = 0, self.nbytes
        for chunk in self._read(0, self.nbytes):
            running = crc32(chunk, running)
            left -= len(chunk)
            if left == 0 and running != self.crc32:
                raise ChecksumMismatch("its bytes do not match their stored checksum; get the file again")
            yield chunk
        self._verified = True

    def _verify(self) -> None:
        """Check the whole once, so that many views of one storage do not read it as many times."""
        if self.crc32 is not None and not self._verified:
            for _ in self._read_whole():
                pass


class StoredRange(_FileSource):
    """Read bytes that lie in the file as they are."""

    __slots__ = ()

    @property
    def file_range(self) -> FileRange | None:
        """Give the place in the file, None where that is elsewhere."""
        return self._file.place(self._offset, self.nbytes)

    def place(self, offset: int) -> None:
        """Say where in the file the bytes begin, once that is known."""
        self._offset = offset

    def _read(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        return self._file.stream(self._offset + offset, nbytes)


class DeflatedRecord(_FileSource):
    """Inflate a record while it is read, never beyond the size that it declares."""

    __slots__ = ("_stored_bytes",)

    def __init__(self, file: InputFile, name: str, offset: int, stored_bytes: int, nbytes: int, crc: int = 0) -> None:
        super().__init__(file, name, offset, nbytes, crc)
        self._stored_bytes = stored_bytes

    @property
    def file_range(self) -> None:
        """Say that the bytes lie nowhere in the file as they are."""
        return None

    def _read(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        whole = nbytes == self.nbytes
        return self._inflate() if whole else cut(self._inflate(), offset, nbytes)

    def _inflate(self) -> Iterator[memoryview]:
        engine = zlib.decompressobj(-zlib.MAX_WBITS)
        left, unread = self.nbytes, self._stored_bytes
        for stored in self._file.stream(self._offset, self._stored_bytes):
            unread -= len(stored)
            for chunk in _inflate_chunk(engine, stored, left):
                left -= len(chunk)
                yield chunk
            if engine.eof:
                break
        if not engine.eof or left or unread or engine.unused_data:
            raise UnreadableCheckpoint("its compressed bytes do not give the size it declares; get the file again")


class DeflatedTail:
    """Give the bytes of a compressed record behind a header of its own; the record's checksum is checked, too."""

    __slots__ = ("_record", "_start", "crc32", "label", "nbytes")

    def __init__(self, record: StoredRange | DeflatedRecord, start: int, crc: int) -> None:
        self._record = record
        self._start = start
        self.crc32 = crc or None
        self.label = record.label
        self.nbytes = record.nbytes - start

    @property
    def file_range(self) -> None:
        """Say that the bytes lie nowhere in the file as they are."""
        return None

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        if offset == 0 and nbytes == self.nbytes:
            return cut(self._record.stream(), self._start, nbytes)
        return self._record.stream(self._start + offset, nbytes)


def read_bytes(source: ByteSource, nbytes: int | None = None) -> bytes:
    """Read a source into memory: all of it, or its first ``nbytes`` bytes."""
    return b"".join([bytes(chunk) for chunk in source.stream(0, nbytes)])


def cut(chunks: Iterator[memoryview], skip: int, nbytes: int) -> Iterator[memoryview]:
    """Yield ``nbytes`` bytes after the first ``skip``, and ask for nothing behind them."""
    for chunk in chunks:
        part = chunk[skip : skip + nbytes]
        skip -= min(skip, len(chunk))
        nbytes -= len(part)
        if part:
            yield part
        if nbytes == 0:
            return


def _inflate_chunk(engine: zlib._Decompress, stored: memoryview, left: int) -> Iterator[memoryview]:
    """Yield what one chunk of compressed bytes gives, refusing the first byte beyond ``left``."""
    pending: bytes | memoryview = stored
    while True:
        limit = min(left + 1, CHUNK_BYTES)
        try:
            chunk = engine.decompress(pending, limit)
        except zlib.error as error:
            raise UnreadableCheckpoint("its compressed bytes are damaged; get the file again") from error
        left -= len(chunk)
        if left < 0:
            raise UnreadableCheckpoint("it expands beyond the size it declares; do not trust the file")
        if chunk:
            yield memoryview(chunk)
        pending = engine.unconsumed_tail
        if engine.eof or (not pending and len(chunk) < limit):
            return


class MemorySource:
    """Give bytes that are already in memory."""

    __slots__ = ("_data", "crc32", "label", "nbytes")

    def __init__(self, label: str, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self.label = label
        self.nbytes = self._data.nbytes
        self.crc32 = None

    @property
    def file_range(self) -> None:
        """Say that the bytes lie nowhere in the file as they are."""
        return None

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        end = range_end(self, offset, nbytes)
        for start in range(offset, end, CHUNK_BYTES):
            yield self._data[start : min(start + CHUNK_BYTES, end)]
