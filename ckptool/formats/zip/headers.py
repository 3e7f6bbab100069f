"""The local headers and descriptors of any zip archive, compared with its directory; nothing may overlap or hide."""

from __future__ import annotations

import struct
from operator import attrgetter

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.zip.directory import ZIP64_EXTRA, Entry, read_extras
from ckptool.formats.zip.layout import (
    BLOCK_BYTES,
    DESCRIPTOR,
    DESCRIPTOR64,
    DESCRIPTOR_SIGNATURE,
    HAS_DESCRIPTOR,
    IN_ZIP64,
    LOCAL,
    LOCAL_SIGNATURE,
    REZIP,
    End,
    Record,
    inconsistent,
)
from ckptool.model.checkpoint import Finding


class Window:
    """Serve short reads that move forward from blocks: many small records cost one read."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._block = b""
        self._start = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        """Give so many bytes of the file, or what there is of them."""
        at = offset - self._start
        if at < 0 or at + nbytes > len(self._block):
            self._block = self._file.read(offset, min(max(nbytes, BLOCK_BYTES), self._file.size - offset))
            self._start, at = offset, 0
        return self._block[at : at + nbytes]


def locate(file: InputFile, entries: list[Entry], end: End) -> tuple[list[Record], list[Finding]]:
    """Find every payload through its local header, in the order of the file; nothing may overlap."""
    window = Window(file)
    records: list[Record] = []
    unlisted = position = 0
    for entry in sorted(entries, key=attrgetter("header")):
        unlisted += _check_gap(window, position, entry.header, is_first=not records)
        offset = read_local(window, entry, end)
        position = offset + entry.stored_bytes
        if position > end.offset:
            raise inconsistent(f"the record {entry.name!r:.100} reaches into the directory")
        if entry.flags & HAS_DESCRIPTOR:
            position += descriptor_size(window, entry, position, end)
        records.append(Record(entry.name, entry.method, entry.crc32, entry.stored_bytes, entry.nbytes, offset))
    unlisted += _check_gap(window, position, end.offset, is_first=not records)
    if not unlisted:
        return records, []
    return records, [Finding("unlisted-bytes", f"{unlisted:,} bytes of the archive belong to no record")]


def _check_gap(window: Window, position: int, header: int, *, is_first: bool) -> int:
    """Count the bytes between two records; refuse what lies before the first, overlaps, or hides a record."""
    gap = header - position
    if gap == 0:
        return 0
    if gap < 0:
        raise inconsistent("two records overlap")
    if is_first:
        raise UnreadableCheckpoint(f"{gap:,} bytes stand before the zip archive, or it is two in one; {REZIP}")
    if window.read(position, min(gap, 4)) == LOCAL_SIGNATURE:
        raise inconsistent("it holds a record that its directory does not list")
    return gap


def read_local(window: Window, entry: Entry, end: End) -> int:
    """Compare the local header with the central entry; give the offset of the payload."""
    name_at = entry.header + LOCAL.size
    if name_at + len(entry.raw_name) > end.offset:
        raise inconsistent(f"the record {entry.name!r:.100} begins outside the archive")
    data = window.read(entry.header, LOCAL.size + len(entry.raw_name))
    size = int.from_bytes(data[LOCAL.size - 2 : LOCAL.size], "little")
    offset = name_at + len(entry.raw_name) + size
    same_name = data[LOCAL.size :] == entry.raw_name
    if offset > end.offset or not same_name or (data[:28] != entry.header_start and not _is_alike(window, entry, data)):
        raise inconsistent(f"the record {entry.name!r:.100} has another header than the directory says")
    return offset


def _is_alike(window: Window, entry: Entry, data: bytes) -> bool:
    """Compare a local header field by field: its version and time may differ, its numbers may be 64 bits wide."""
    signature, _, flags, method, _, _, crc, stored, nbytes, name_size, extra_size = LOCAL.unpack_from(data)
    if IN_ZIP64 in (stored, nbytes):
        extra = window.read(entry.header + len(data), extra_size)
        nbytes, stored = _widen_local((nbytes, stored), read_extras(extra, entry.name), entry)
    _check_local_numbers(entry, crc, stored, nbytes)
    kept = (LOCAL_SIGNATURE, entry.flags, entry.method, len(entry.raw_name))
    return (signature, flags, method, name_size) == kept


def _widen_local(narrow: tuple[int, int], extras: dict[int, bytes], entry: Entry) -> tuple[int, ...]:
    """Take local sizes from the 64-bit extra field, which always holds both, and in torch's files the offset too."""
    wide = extras.get(ZIP64_EXTRA, b"")
    if len(wide) not in (16, 24):
        raise inconsistent(f"the record {entry.name!r:.100} has a local 64-bit field of {len(wide)} bytes")
    values = struct.unpack_from("<2Q", wide)
    return tuple(value if value_32 == IN_ZIP64 else value_32 for value, value_32 in zip(values, narrow, strict=True))


def _check_local_numbers(entry: Entry, crc: int, stored: int, nbytes: int) -> None:
    """Demand the central numbers, or zeros where a descriptor follows."""
    pairs = ((crc, entry.crc32), (stored, entry.stored_bytes), (nbytes, entry.nbytes))
    later = bool(entry.flags & HAS_DESCRIPTOR)
    if any(local != central and not (later and local == 0) for local, central in pairs):
        raise inconsistent(f"the record {entry.name!r:.100} has another size or checksum than the directory says")


def descriptor_size(window: Window, entry: Entry, position: int, end: End) -> int:
    """Find the descriptor behind a payload in one of its four spellings; give its size in bytes."""
    found = window.read(position, min(DESCRIPTOR64.size, end.offset - position))
    if entry.descriptor and found.startswith(entry.descriptor):
        return DESCRIPTOR.size
    numbers = entry.crc32, entry.stored_bytes, entry.nbytes
    for layout in (DESCRIPTOR, DESCRIPTOR64):
        if layout is DESCRIPTOR and max(numbers) > IN_ZIP64:
            continue
        signed = layout.pack(DESCRIPTOR_SIGNATURE, *numbers)
        for spelling in (signed, signed[4:]):
            if found.startswith(spelling):
                return len(spelling)
    raise inconsistent(f"the record {entry.name!r:.100} has another descriptor than the directory says")
