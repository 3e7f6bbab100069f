"""The end of a zip archive: where its directory lies, and how large it is."""

from __future__ import annotations

import re
import struct

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.zip.layout import IN_ZIP64, REZIP, End, inconsistent

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")

_END_SIGNATURE = b"PK\x05\x06"
_END64_SIGNATURE = b"PK\x06\x06"
_LOCATOR_SIGNATURE = b"PK\x06\x07"

_LONGEST_COMMENT = 0xFFFF
_MOST_ENTRIES = 1_000_000
_LARGEST_DIRECTORY = 512 << 20


def has_directory(file: InputFile) -> bool:
    """Tell whether the file ends with the directory of a zip archive, whatever it begins with."""
    tail = _read_tail(file)
    return bool(_end_positions(tail)[0])


def _read_tail(file: InputFile) -> bytes:
    nbytes = min(file.size, _END.size + _LONGEST_COMMENT)
    return file.read(file.size - nbytes, nbytes)


def _end_positions(tail: bytes) -> tuple[list[int], int]:
    """Find the end records whose comment reaches the end of the file, and the last signature of any."""
    positions = [match.start() for match in re.finditer(_END_SIGNATURE, tail)]
    exact = [
        at
        for at in positions
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail)
    ]
    return exact, positions[-1] if positions else -1


def find_end(file: InputFile) -> End:
    """Find the directory through the end of the file.

    :raises UnreadableCheckpoint: there is none, or readers could find another.
    """
    tail = _read_tail(file)
    exact, last = _end_positions(tail)
    if not exact:
        raise _no_end(file, tail, last)
    if exact != [last]:
        raise UnreadableCheckpoint(f"the zip archive has two ends, and readers differ on which one counts; {REZIP}")
    disk, start_disk, here, total, size, offset, _ = _END.unpack_from(tail, last)[1:]
    if disk or start_disk or here != total:
        raise UnreadableCheckpoint("this is one part of a zip archive in several parts; join them first")
    position = file.size - len(tail) + last
    end = End(total, size, offset, position)
    end = _read_zip64(file, end) or end
    _check_end(end)
    return end


def _no_end(file: InputFile, tail: bytes, last: int) -> UnreadableCheckpoint:
    if 0 <= last <= len(tail) - _END.size:
        comment = _END.unpack_from(tail, last)[7]
        excess = len(tail) - last - _END.size - comment
        if excess > 0:
            return UnreadableCheckpoint(f"{excess} bytes follow the end of the zip archive; cut them off or {AGAIN}")
    return UnreadableCheckpoint(
        f"this is a truncated zip archive: {file.size:,} bytes are there, its end is not; {AGAIN}"
    )


def _read_zip64(file: InputFile, end: End) -> End | None:
    """Follow the 64-bit locator before the end record, which torch always writes; both must agree."""
    at = end.tail - _END64_LOCATOR.size
    if at < 0:
        return None
    signature, disk, offset, disks = _END64_LOCATOR.unpack(file.read(at, _END64_LOCATOR.size))
    if signature != _LOCATOR_SIGNATURE:
        return None
    if disk or disks > 1 or offset + _END64.size > at:
        raise inconsistent("its 64-bit end record is misplaced")
    signature, size, _, _, disk, start_disk, here, total, directory_size, directory_offset = _END64.unpack(
        file.read(offset, _END64.size)
    )
    if signature != _END64_SIGNATURE or offset + 12 + size != at or disk or start_disk or here != total:
        raise inconsistent("its 64-bit end record is damaged")
    end64 = End(total, directory_size, directory_offset, offset)
    pairs = zip((0xFFFF, IN_ZIP64, IN_ZIP64), end, end64, strict=False)
    if any(narrow not in (wide, limit) for limit, narrow, wide in pairs):
        raise inconsistent("its two end records disagree")
    return end64


def _check_end(end: End) -> None:
    if end.offset + end.size != end.tail:
        raise inconsistent("its directory is not where its end record says")
    if end.entries > _MOST_ENTRIES or end.size > _LARGEST_DIRECTORY:
        raise UnreadableCheckpoint(
            f"the zip archive declares {end.entries:,} records, more than the {_MOST_ENTRIES:,} that are read; {REZIP}"
        )
