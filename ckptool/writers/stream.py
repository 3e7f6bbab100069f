"""Move the bytes of payloads into a file, with their checksums, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.checksums import crc32
from ckptool.model.copies import Extent, Payload
from ckptool.model.sources import Progress


def copy_payload(payload: Payload, file: BinaryIO, progress: Progress) -> int:
    """Write the bytes of one payload; give their CRC32.

    :raises UnreadableCheckpoint: a source gives other bytes, or another number of them, than it promised.
    """
    stored = _stored_checksum(payload)
    computed = 0
    for extent in payload.extents:
        for chunk in _chunks(extent):
            if stored is None:
                computed = crc32(chunk, computed)
            file.write(chunk)
            progress.advance(len(chunk))
    return computed if stored is None else stored


def _stored_checksum(payload: Payload) -> int | None:
    """Give the checksum that the source itself checks while it is read, where it is that of the whole payload."""
    if len(payload.extents) != 1:
        return None
    extent = payload.extents[0]
    whole = extent.offset == 0 and extent.nbytes == extent.source.nbytes
    return extent.source.crc32 if whole else None


def _chunks(extent: Extent) -> Iterator[memoryview]:
    """Yield the bytes of one extent, exactly as many as it promises: the places of all others depend on it."""
    left = extent.nbytes
    for chunk in extent.source.stream(extent.offset, extent.nbytes):
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left:
        raise UnreadableCheckpoint(
            f"{extent.source.label}: gave another number of bytes than the {extent.nbytes} it promised; "
            "the file may have changed while it was read: try again"
        )
