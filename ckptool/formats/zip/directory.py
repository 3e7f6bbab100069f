"""The central directory of any zip archive, entry by entry."""

from __future__ import annotations

import stat
import struct
from typing import NamedTuple

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.zip.layout import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    DEFLATED,
    DESCRIPTOR_SIGNATURE,
    ENCRYPTED,
    HAS_DESCRIPTOR,
    IN_ZIP64,
    IS_FOLDER,
    IS_UTF8,
    KNOWN_FLAGS,
    LOCAL_SIGNATURE,
    NO_NUMBERS,
    REZIP,
    STORED,
    End,
    inconsistent,
)

_EXTRA = struct.Struct("<2H")

ZIP64_EXTRA = 0x0001
_UNICODE_PATH_EXTRA = 0x7075
_MADE_ON_UNIX = 3
_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 99: "an encryption"}


class Entry(NamedTuple):
    """Hold one entry of the central directory.

    ``header_start`` is how its local header usually begins, ``descriptor`` how its descriptor is usually spelled; both
    are empty where a size takes 64 bits.
    """

    name: str
    raw_name: bytes
    header_start: bytes
    descriptor: bytes
    flags: int
    method: int
    crc32: int
    stored_bytes: int
    nbytes: int
    header: int
    is_link: bool


def read_entries(directory: bytes, end: End) -> list[Entry]:
    """Read every entry.

    :raises UnreadableCheckpoint: one is damaged, or of a kind that is not read.
    """
    entries = []
    at = 0
    for _ in range(end.entries):
        if at + CENTRAL.size > len(directory):
            raise inconsistent("its directory is shorter than it declares")
        entry, at = _read_entry(directory, at)
        entries.append(entry)
    if at != len(directory):
        raise inconsistent("its directory is longer than it declares")
    return entries


def _read_entry(directory: bytes, at: int) -> tuple[Entry, int]:
    (signature, made_by, _, flags, method, _, _, crc, stored, nbytes, name_size, extra_size, comment_size, disk, _,
     attributes, header) = CENTRAL.unpack_from(directory, at)  # fmt: skip
    name_end = at + CENTRAL.size + name_size
    extra_end = name_end + extra_size
    after = extra_end + comment_size
    if signature != CENTRAL_SIGNATURE or after > len(directory):
        raise inconsistent("its directory has a damaged entry")
    raw_name = directory[at + CENTRAL.size : name_end]
    name = _decode_name(raw_name, flags)
    header_start = descriptor = b""
    if stored != IN_ZIP64 != nbytes:
        header_start, descriptor = _usual_spelling(directory, at, flags)
    if extra_size or stored == IN_ZIP64 or nbytes == IN_ZIP64 or header == IN_ZIP64:
        extras = read_extras(directory[name_end:extra_end], name)
        nbytes, stored, header = _widen((nbytes, stored, header), extras, name)
        _check_unicode_path(raw_name, extras, name)
    if flags & ~KNOWN_FLAGS or disk or method not in (STORED, DEFLATED) or (method == STORED and stored != nbytes):
        raise _refuse_entry(name, flags, method, disk)
    if attributes & IS_FOLDER and not name.endswith("/"):
        raise inconsistent(f"the record {name!r:.100} is marked as a folder")
    is_link = made_by >> 8 == _MADE_ON_UNIX and stat.S_ISLNK(attributes >> 16)
    return Entry(name, raw_name, header_start, descriptor, flags, method, crc, stored, nbytes, header, is_link), after


def _usual_spelling(directory: bytes, at: int, flags: int) -> tuple[bytes, bytes]:
    """Spell the local header up to its extra field's length, and the descriptor, as a central entry suggests them."""
    numbers = directory[at + 16 : at + 28]
    local_numbers = NO_NUMBERS if flags & HAS_DESCRIPTOR else numbers
    header_start = LOCAL_SIGNATURE + directory[at + 6 : at + 16] + local_numbers + directory[at + 28 : at + 30]
    return header_start, DESCRIPTOR_SIGNATURE + numbers


def _refuse_entry(name: str, flags: int, method: int, disk: int) -> UnreadableCheckpoint:
    if flags & ENCRYPTED:
        return UnreadableCheckpoint(f"the record {name!r:.100} is marked as encrypted; decrypt the archive first")
    if flags & ~KNOWN_FLAGS or disk:
        return inconsistent(f"the record {name!r:.100} has flags that no writer of checkpoints sets")
    if method != STORED:
        kind = _METHODS.get(method, f"method {method}")
        return UnreadableCheckpoint(f"the record {name!r:.100} is compressed with {kind}; {REZIP}")
    return inconsistent(f"the record {name!r:.100} is stored as it is, but in another size than its own")


def _decode_name(raw_name: bytes, flags: int) -> str:
    """Decode as the archive says: UTF-8 where bit 11 is set, else code page 437 (APPNOTE, appendix D)."""
    try:
        return raw_name.decode("utf-8" if flags & IS_UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise inconsistent(f"the record name {raw_name!r:.100} is no UTF-8") from error


def read_extras(extra: bytes, name: str) -> dict[int, bytes]:
    """Give the extra fields of the record of that name by their kind.

    :raises UnreadableCheckpoint: they are damaged, or one that counts stands twice.
    """
    extras: dict[int, bytes] = {}
    at = 0
    while at + _EXTRA.size <= len(extra):
        kind, size = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size
        if at + size > len(extra) or (kind in extras and kind in (ZIP64_EXTRA, _UNICODE_PATH_EXTRA)):
            raise inconsistent(f"the record {name!r:.100} has damaged extra fields")
        extras[kind] = extra[at : at + size]
        at += size
    return extras


def _widen(narrow: tuple[int, int, int], extras: dict[int, bytes], name: str) -> tuple[int, ...]:
    """Take from the 64-bit extra field what did not fit: size, stored size and header offset, in this order."""
    missing = sum(value == IN_ZIP64 for value in narrow)
    wide = extras.get(ZIP64_EXTRA, b"")
    if len(wide) != 8 * missing:
        raise inconsistent(f"the record {name!r:.100} has a 64-bit field of {len(wide)} bytes, not {8 * missing}")
    values = iter(struct.unpack(f"<{missing}Q", wide))
    return tuple(next(values) if value == IN_ZIP64 else value for value in narrow)


def _check_unicode_path(raw_name: bytes, extras: dict[int, bytes], name: str) -> None:
    unicode_path = extras.get(_UNICODE_PATH_EXTRA)
    if unicode_path is not None and unicode_path[5:] != raw_name:
        raise UnreadableCheckpoint(f"the record {name!r:.100} has a second, different name; {REZIP}")
