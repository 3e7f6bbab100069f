"""Where bytes come from: a file range, an inflated record, a view that is gathered while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ckptool.errors import UnreadableCheckpoint

CHUNK_BYTES = 1 << 20  # large enough for full throughput, small enough to stay in the L2 cache for the CRC


@dataclass(frozen=True, slots=True)
class FileRange:
    """Name ``nbytes`` bytes at ``offset`` (bytes) of the open file ``fd``: what can be memory-mapped."""

    fd: int
    offset: int
    nbytes: int


class ByteSource(Protocol):
    """Yield the bytes of one storage, whatever holds them."""

    @property
    def label(self) -> str:
        """Name the place for an error message: file and record."""

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""

    @property
    def crc32(self) -> int | None:
        """Give the checksum stored for the whole source, or None where there is none (a stored 0 is none)."""

    @property
    def file_range(self) -> FileRange | None:
        """Give the place in the file where these very bytes lie, or None where they are computed."""

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, in chunks of at most ``CHUNK_BYTES``.

        A chunk is valid until the next one is asked for. Where a checksum is stored, it is checked before the
        last chunk of a whole read is passed on, and before the first chunk of a partial one.

        :raises ChecksumMismatch: the bytes are not those that were written.
        :raises UnreadableCheckpoint: the file ended early or changed while it was read.
        """


def range_end(source: ByteSource, offset: int, nbytes: int | None) -> int:
    """Give the end in bytes of a range of a source; None asks for all that is left.

    :raises UnreadableCheckpoint: the range is not inside the source.
    """
    end = source.nbytes if nbytes is None else offset + nbytes
    if not 0 <= offset <= end <= source.nbytes:
        raise UnreadableCheckpoint(f"{source.label}: bytes {offset} to {end} lie outside its {source.nbytes}")
    return end


def has_checksum(source: ByteSource) -> bool:
    """Tell whether reading all of a source proves its bytes, by its own checksum or by those of its ``parts``.

    :raises UnreadableCheckpoint: a part cannot be opened.
    """
    parts: tuple[ByteSource, ...] | None = getattr(source, "parts", None)
    return source.crc32 is not None if parts is None else all(map(has_checksum, parts))


class Progress(Protocol):
    """Be told how many bytes have been moved."""

    def start(self, label: str, total_bytes: int) -> None:
        """Begin one task of ``total_bytes``."""

    def advance(self, nbytes: int) -> None:
        """Count ``nbytes`` more."""


class NoProgress:
    """Say nothing."""

    def start(self, label: str, total_bytes: int) -> None:
        """Ignore the task."""

    def advance(self, nbytes: int) -> None:
        """Ignore the bytes."""
