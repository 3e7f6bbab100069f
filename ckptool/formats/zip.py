"""A zip archive, read so that no two readers could disagree on what it holds.

Layout: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5. Everything the central directory says is compared with the local
headers and descriptors; what is stated twice must be stated alike.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.sources import DeflatedRecord, StoredRange
from ckptool.model.checkpoint import Finding
from ckptool.model.rows import make_rows

STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_EXTRA = struct.Struct("<2H")

LOCAL_SIGNATURE = b"PK\x03\x04"
END_SIGNATURE = b"PK\x05\x06"
_CENTRAL_SIGNATURE = b"PK\x01\x02"
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_END64_SIGNATURE = b"PK\x06\x06"
_LOCATOR_SIGNATURE = b"PK\x06\x07"

_LONGEST_COMMENT = 0xFFFF
_IN_ZIP64 = 0xFFFFFFFF
_MOST_ENTRIES = 1_000_000
_LARGEST_DIRECTORY = 512 << 20
_BLOCK_BYTES = 4096
_NO_NUMBERS = bytes(12)

_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_HAS_DESCRIPTOR = 1 << 3
_IS_UTF8 = 1 << 11
# Bits 1 and 2 only say how hard the compressor tried.
_KNOWN_FLAGS = 1 << 1 | 1 << 2 | _HAS_DESCRIPTOR | _IS_UTF8

_ZIP64_EXTRA = 0x0001
_UNICODE_PATH_EXTRA = 0x7075
_MADE_ON_UNIX = 3
# Set for a folder; torch then reads nothing for the record and hands out uninitialised memory.
_IS_FOLDER = 0x10
_ODD_ATTRIBUTES = _IS_FOLDER | 0o170000 << 16  # what Unix calls the type of a file stands in the upper half

_TORCH_ALIGNMENT = 64
_STORAGE = re.compile(r"^[^/]+/data/[0-9]+$")

_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 99: "an encryption"}
# What no record name may hold, once every name stands between two NULs.
_FORBIDDEN_PARTS = ("\\", "//", "\0/", "\0\0")
_DOTS_END = ("./", ".\0")  # as do few names, and all that have a segment of dots alone
_DOTS = re.compile(r"[/\0]\.\.?[/\0]")
_DRIVE = re.compile(r"\0[A-Za-z]:/")

_REZIP = "write the checkpoint anew with torch.save"
_AGAIN = "get the file again"


class Record(NamedTuple):
    """Place one record of the archive: its payload begins at ``offset``; sizes are in bytes, a CRC of 0 is none."""

    name: str
    method: int
    crc32: int
    stored_bytes: int
    nbytes: int
    offset: int

    def open(self, file: InputFile) -> StoredRange | DeflatedRecord:
        """Give the source of the record's bytes."""
        if self.method == STORED:
            return StoredRange(file, self.name, self.offset, self.nbytes, self.crc32)
        return DeflatedRecord(file, self.name, self.offset, self.stored_bytes, self.nbytes, self.crc32)


@dataclass(frozen=True, slots=True)
class Archive:
    """Hold every record by name, in the order of the file, and what is odd about the archive."""

    records: dict[str, Record]
    findings: tuple[Finding, ...]


class _End(NamedTuple):
    """Say where the central directory lies, in bytes, how many entries it has, and where the file's tail begins."""

    entries: int
    size: int
    offset: int
    tail: int


class _Entry(NamedTuple):
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


def read_archive(file: InputFile) -> Archive:
    """Read the directory of a zip archive and check it against the whole file; no payload is read.

    :raises UnreadableCheckpoint: it is damaged, or two readers could disagree on it.
    """
    end = _find_end(file)
    directory = file.read(end.offset, end.size)
    plain = None if file.is_remote else _read_plain_records(file, directory, end)
    records, findings = (plain, []) if plain is not None else _read_records(file, directory, end)
    return Archive({record.name: record for record in records}, tuple(findings))


def _read_records(file: InputFile, directory: bytes, end: _End) -> tuple[list[Record], list[Finding]]:
    """Read any archive: what is odd about one is refused with a sentence or becomes a finding."""
    entries = _read_entries(directory, end)
    _check_names([entry.name for entry in entries])
    records, findings = _locate_remote(file, entries, end) if file.is_remote else _locate(file, entries, end)
    _check_expansion(records, file.size)
    findings += [
        Finding("symlink-record", f"the record {entry.name!r:.100} is marked as a symbolic link")
        for entry in entries
        if entry.is_link
    ]
    return records, findings


def has_directory(file: InputFile) -> bool:
    """Tell whether the file ends with the directory of a zip archive, whatever it begins with."""
    tail = _read_tail(file)
    return bool(_end_positions(tail)[0])


# --- the end of the archive ---------------------------------------------------------------------------------------


def _read_tail(file: InputFile) -> bytes:
    nbytes = min(file.size, _END.size + _LONGEST_COMMENT)
    return file.read(file.size - nbytes, nbytes)


def _end_positions(tail: bytes) -> tuple[list[int], int]:
    """Find the end records whose comment reaches the end of the file, and the last signature of any."""
    positions = [match.start() for match in re.finditer(END_SIGNATURE, tail)]
    exact = [
        at
        for at in positions
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail)
    ]
    return exact, positions[-1] if positions else -1


def _find_end(file: InputFile) -> _End:
    tail = _read_tail(file)
    exact, last = _end_positions(tail)
    if not exact:
        raise _no_end(file, tail, last)
    if exact != [last]:
        raise UnreadableCheckpoint(f"the zip archive has two ends, and readers differ on which one counts; {_REZIP}")
    disk, start_disk, here, total, size, offset, _ = _END.unpack_from(tail, last)[1:]
    if disk or start_disk or here != total:
        raise UnreadableCheckpoint("this is one part of a zip archive in several parts; join them first")
    position = file.size - len(tail) + last
    end = _End(total, size, offset, position)
    end = _read_zip64(file, end) or end
    _check_end(end)
    return end


def _no_end(file: InputFile, tail: bytes, last: int) -> UnreadableCheckpoint:
    if 0 <= last <= len(tail) - _END.size:
        comment = _END.unpack_from(tail, last)[7]
        excess = len(tail) - last - _END.size - comment
        if excess > 0:
            return UnreadableCheckpoint(f"{excess} bytes follow the end of the zip archive; cut them off or {_AGAIN}")
    return UnreadableCheckpoint(
        f"this is a truncated zip archive: {file.size:,} bytes are there, its end is not; {_AGAIN}"
    )


def _read_zip64(file: InputFile, end: _End) -> _End | None:
    """Follow the 64-bit locator before the end record, which torch always writes; both must agree."""
    at = end.tail - _END64_LOCATOR.size
    if at < 0:
        return None
    signature, disk, offset, disks = _END64_LOCATOR.unpack(file.read(at, _END64_LOCATOR.size))
    if signature != _LOCATOR_SIGNATURE:
        return None
    if disk or disks > 1 or offset + _END64.size > at:
        raise _inconsistent("its 64-bit end record is misplaced")
    signature, size, _, _, disk, start_disk, here, total, directory_size, directory_offset = _END64.unpack(
        file.read(offset, _END64.size)
    )
    if signature != _END64_SIGNATURE or offset + 12 + size != at or disk or start_disk or here != total:
        raise _inconsistent("its 64-bit end record is damaged")
    end64 = _End(total, directory_size, directory_offset, offset)
    pairs = zip((0xFFFF, _IN_ZIP64, _IN_ZIP64), end, end64, strict=False)
    if any(narrow not in (wide, limit) for limit, narrow, wide in pairs):
        raise _inconsistent("its two end records disagree")
    return end64


def _check_end(end: _End) -> None:
    if end.offset + end.size != end.tail:
        raise _inconsistent("its directory is not where its end record says")
    if end.entries > _MOST_ENTRIES or end.size > _LARGEST_DIRECTORY:
        raise UnreadableCheckpoint(
            f"the zip archive declares {end.entries:,} records, more than the {_MOST_ENTRIES:,} that are read; {_REZIP}"
        )


def _inconsistent(what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the zip archive is damaged or was tampered with: {what}; {_AGAIN}")


# --- the central directory ----------------------------------------------------------------------------------------


def _read_entries(directory: bytes, end: _End) -> list[_Entry]:
    entries = []
    at = 0
    for _ in range(end.entries):
        if at + _CENTRAL.size > len(directory):
            raise _inconsistent("its directory is shorter than it declares")
        entry, at = _read_entry(directory, at)
        entries.append(entry)
    if at != len(directory):
        raise _inconsistent("its directory is longer than it declares")
    return entries


def _read_entry(directory: bytes, at: int) -> tuple[_Entry, int]:
    (signature, made_by, _, flags, method, _, _, crc, stored, nbytes, name_size, extra_size, comment_size, disk, _,
     attributes, header) = _CENTRAL.unpack_from(directory, at)  # fmt: skip
    name_end = at + _CENTRAL.size + name_size
    extra_end = name_end + extra_size
    after = extra_end + comment_size
    if signature != _CENTRAL_SIGNATURE or after > len(directory):
        raise _inconsistent("its directory has a damaged entry")
    raw_name = directory[at + _CENTRAL.size : name_end]
    name = _decode_name(raw_name, flags)
    header_start = descriptor = b""
    if stored != _IN_ZIP64 != nbytes:
        header_start, descriptor = _usual_spelling(directory, at, flags)
    if extra_size or stored == _IN_ZIP64 or nbytes == _IN_ZIP64 or header == _IN_ZIP64:
        extras = _read_extras(directory[name_end:extra_end], name)
        nbytes, stored, header = _widen((nbytes, stored, header), extras, name)
        _check_unicode_path(raw_name, extras, name)
    if flags & ~_KNOWN_FLAGS or disk or method not in (STORED, DEFLATED) or (method == STORED and stored != nbytes):
        raise _refuse_entry(name, flags, method, disk)
    if attributes & _IS_FOLDER and not name.endswith("/"):
        raise _inconsistent(f"the record {name!r:.100} is marked as a folder")
    is_link = made_by >> 8 == _MADE_ON_UNIX and stat.S_ISLNK(attributes >> 16)
    return _Entry(name, raw_name, header_start, descriptor, flags, method, crc, stored, nbytes, header, is_link), after


def _usual_spelling(directory: bytes, at: int, flags: int) -> tuple[bytes, bytes]:
    """Spell the local header up to its extra field's length, and the descriptor, as a central entry suggests them."""
    numbers = directory[at + 16 : at + 28]
    local_numbers = _NO_NUMBERS if flags & _HAS_DESCRIPTOR else numbers
    header_start = LOCAL_SIGNATURE + directory[at + 6 : at + 16] + local_numbers + directory[at + 28 : at + 30]
    return header_start, _DESCRIPTOR_SIGNATURE + numbers


def _refuse_entry(name: str, flags: int, method: int, disk: int) -> UnreadableCheckpoint:
    if flags & _ENCRYPTED:
        return UnreadableCheckpoint(f"the record {name!r:.100} is marked as encrypted; decrypt the archive first")
    if flags & ~_KNOWN_FLAGS or disk:
        return _inconsistent(f"the record {name!r:.100} has flags that no writer of checkpoints sets")
    if method != STORED:
        kind = _METHODS.get(method, f"method {method}")
        return UnreadableCheckpoint(f"the record {name!r:.100} is compressed with {kind}; {_REZIP}")
    return _inconsistent(f"the record {name!r:.100} is stored as it is, but in another size than its own")


def _decode_name(raw_name: bytes, flags: int) -> str:
    """Decode as the archive says: UTF-8 where bit 11 is set, else code page 437 (APPNOTE, appendix D)."""
    try:
        return raw_name.decode("utf-8" if flags & _IS_UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise _inconsistent(f"the record name {raw_name!r:.100} is no UTF-8") from error


def _read_extras(extra: bytes, name: str) -> dict[int, bytes]:
    extras: dict[int, bytes] = {}
    at = 0
    while at + _EXTRA.size <= len(extra):
        kind, size = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size
        if at + size > len(extra) or (kind in extras and kind in (_ZIP64_EXTRA, _UNICODE_PATH_EXTRA)):
            raise _inconsistent(f"the record {name!r:.100} has damaged extra fields")
        extras[kind] = extra[at : at + size]
        at += size
    return extras


def _widen(narrow: tuple[int, int, int], extras: dict[int, bytes], name: str) -> tuple[int, ...]:
    """Take from the 64-bit extra field what did not fit: size, stored size and header offset, in this order."""
    missing = sum(value == _IN_ZIP64 for value in narrow)
    wide = extras.get(_ZIP64_EXTRA, b"")
    if len(wide) != 8 * missing:
        raise _inconsistent(f"the record {name!r:.100} has a 64-bit field of {len(wide)} bytes, not {8 * missing}")
    values = iter(struct.unpack(f"<{missing}Q", wide))
    return tuple(next(values) if value == _IN_ZIP64 else value for value in narrow)


def _check_unicode_path(raw_name: bytes, extras: dict[int, bytes], name: str) -> None:
    unicode_path = extras.get(_UNICODE_PATH_EXTRA)
    if unicode_path is not None and unicode_path[5:] != raw_name:
        raise UnreadableCheckpoint(f"the record {name!r:.100} has a second, different name; {_REZIP}")


def _check_names(names: list[str]) -> None:
    """Refuse what two readers could look up differently: torch ignores case and stops at a NUL."""
    # All names at once, because a search in one long text costs less than a million short ones.
    listing = "\0".join(["", *names, ""])
    is_plain = listing.count("\0") == len(names) + 1 and not _is_forbidden(listing)
    if not is_plain or len(set(listing.lower().split("\0"))) != len(names) + 1:
        _refuse_names(names)


def _is_forbidden(listing: str) -> bool:
    """Tell whether a name between two NULs is no plain path, or one of many."""
    return (
        any(part in listing for part in _FORBIDDEN_PARTS)
        or (any(end in listing for end in _DOTS_END) and _DOTS.search(listing) is not None)
        or (":/" in listing and _DRIVE.search(listing) is not None)
    )


def _refuse_names(names: Iterable[str]) -> None:
    """Say which name is at fault."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.lower()
        if "\0" in name or _is_forbidden(f"\0{name}\0"):
            raise UnreadableCheckpoint(f"the record name {name!r:.100} is not a plain path; {_REZIP}")
        if key in seen:
            how = "twice" if seen[key] == name else f"beside {seen[key]!r:.100}, and torch ignores case"
            raise UnreadableCheckpoint(
                f"the zip archive is ambiguous: it holds the record {name!r:.100} {how}; {_REZIP}"
            )
        seen[key] = name


def _check_expansion(records: Iterable[Record], file_bytes: int) -> None:
    limit = max(4 * file_bytes, 1 << 30)
    total = sum(record.nbytes for record in records if record.method == DEFLATED)
    if total > limit:
        raise UnreadableCheckpoint(
            f"the zip archive would expand from {file_bytes:,} to {total:,} bytes; unpack and zip it uncompressed first"
        )


# --- the local headers --------------------------------------------------------------------------------------------


class _Window:
    """Serve short reads that move forward from blocks: many small records cost one read."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._block = b""
        self._start = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        """Give so many bytes of the file, or what there is of them."""
        at = offset - self._start
        if at < 0 or at + nbytes > len(self._block):
            self._block = self._file.read(offset, min(max(nbytes, _BLOCK_BYTES), self._file.size - offset))
            self._start, at = offset, 0
        return self._block[at : at + nbytes]


def _locate(file: InputFile, entries: list[_Entry], end: _End) -> tuple[list[Record], list[Finding]]:
    """Find every payload through its local header, in the order of the file; nothing may overlap."""
    window = _Window(file)
    records: list[Record] = []
    unlisted = position = 0
    for entry in sorted(entries, key=attrgetter("header")):
        unlisted += _check_gap(window, position, entry.header, is_first=not records)
        offset = _read_local(window, entry, end)
        position = offset + entry.stored_bytes
        if position > end.offset:
            raise _inconsistent(f"the record {entry.name!r:.100} reaches into the directory")
        if entry.flags & _HAS_DESCRIPTOR:
            position += _descriptor_size(window, entry, position, end)
        records.append(Record(entry.name, entry.method, entry.crc32, entry.stored_bytes, entry.nbytes, offset))
    unlisted += _check_gap(window, position, end.offset, is_first=not records)
    if not unlisted:
        return records, []
    return records, [Finding("unlisted-bytes", f"{unlisted:,} bytes of the archive belong to no record")]


def _check_gap(window: _Window, position: int, header: int, *, is_first: bool) -> int:
    """Count the bytes between two records; refuse what lies before the first, overlaps, or hides a record."""
    gap = header - position
    if gap == 0:
        return 0
    if gap < 0:
        raise _inconsistent("two records overlap")
    if is_first:
        raise UnreadableCheckpoint(f"{gap:,} bytes stand before the zip archive, or it is two in one; {_REZIP}")
    if window.read(position, min(gap, 4)) == LOCAL_SIGNATURE:
        raise _inconsistent("it holds a record that its directory does not list")
    return gap


def _read_local(window: _Window, entry: _Entry, end: _End) -> int:
    """Compare the local header with the central entry; give the offset of the payload."""
    name_at = entry.header + _LOCAL.size
    if name_at + len(entry.raw_name) > end.offset:
        raise _inconsistent(f"the record {entry.name!r:.100} begins outside the archive")
    data = window.read(entry.header, _LOCAL.size + len(entry.raw_name))
    size = int.from_bytes(data[_LOCAL.size - 2 : _LOCAL.size], "little")
    offset = name_at + len(entry.raw_name) + size
    same_name = data[_LOCAL.size :] == entry.raw_name
    if offset > end.offset or not same_name or (data[:28] != entry.header_start and not _is_alike(window, entry, data)):
        raise _inconsistent(f"the record {entry.name!r:.100} has another header than the directory says")
    return offset


def _is_alike(window: _Window, entry: _Entry, data: bytes) -> bool:
    """Compare a local header field by field: its version and time may differ, its numbers may be 64 bits wide."""
    signature, _, flags, method, _, _, crc, stored, nbytes, name_size, extra_size = _LOCAL.unpack_from(data)
    if _IN_ZIP64 in (stored, nbytes):
        extra = window.read(entry.header + len(data), extra_size)
        nbytes, stored = _widen_local((nbytes, stored), _read_extras(extra, entry.name), entry)
    _check_local_numbers(entry, crc, stored, nbytes)
    kept = (LOCAL_SIGNATURE, entry.flags, entry.method, len(entry.raw_name))
    return (signature, flags, method, name_size) == kept


def _widen_local(narrow: tuple[int, int], extras: dict[int, bytes], entry: _Entry) -> tuple[int, ...]:
    """Take local sizes from the 64-bit extra field, which always holds both, and in torch's files the offset too."""
    wide = extras.get(_ZIP64_EXTRA, b"")
    if len(wide) not in (16, 24):
        raise _inconsistent(f"the record {entry.name!r:.100} has a local 64-bit field of {len(wide)} bytes")
    values = struct.unpack_from("<2Q", wide)
    return tuple(value if value_32 == _IN_ZIP64 else value_32 for value, value_32 in zip(values, narrow, strict=True))


def _check_local_numbers(entry: _Entry, crc: int, stored: int, nbytes: int) -> None:
    """Demand the central numbers, or zeros where a descriptor follows."""
    pairs = ((crc, entry.crc32), (stored, entry.stored_bytes), (nbytes, entry.nbytes))
    later = bool(entry.flags & _HAS_DESCRIPTOR)
    if any(local != central and not (later and local == 0) for local, central in pairs):
        raise _inconsistent(f"the record {entry.name!r:.100} has another size or checksum than the directory says")


def _descriptor_size(window: _Window, entry: _Entry, position: int, end: _End) -> int:
    """Find the descriptor behind a payload in one of its four spellings; give its size in bytes."""
    found = window.read(position, min(_DESCRIPTOR64.size, end.offset - position))
    if entry.descriptor and found.startswith(entry.descriptor):
        return _DESCRIPTOR.size
    numbers = entry.crc32, entry.stored_bytes, entry.nbytes
    for layout in (_DESCRIPTOR, _DESCRIPTOR64):
        if layout is _DESCRIPTOR and max(numbers) > _IN_ZIP64:
            continue
        signed = layout.pack(_DESCRIPTOR_SIGNATURE, *numbers)
        for spelling in (signed, signed[4:]):
            if found.startswith(spelling):
                return len(spelling)
    raise _inconsistent(f"the record {entry.name!r:.100} has another descriptor than the directory says")


# --- the local headers of a file elsewhere ------------------------------------------------------------------------


class _Direct(_Window):
    """Read no more than is asked for: what is elsewhere is fetched in blocks already."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Give so many bytes of the file, or what there is of them."""
        return self._file.read(offset, min(nbytes, self._file.size - offset))


class _Place(NamedTuple):
    """Say where a record's payload begins and ends, and its descriptor ends, in bytes, if torch has written it."""

    entry: _Entry
    offset: int
    stop: int
    end: int


def _locate_remote(file: InputFile, entries: list[_Entry], end: _End) -> tuple[list[Record], list[Finding]]:
    """Find the payloads through the directory where torch's alignment vouches for it: a header costs a request each.

    What is at hand, or is no storage, is compared at once; a storage's header before its bytes are streamed.
    """
    from ckptool.formats.remote.file import RemoteFile, UseCheck

    assert isinstance(file, RemoteFile)
    places = _aligned_places(sorted(entries, key=attrgetter("header")), end)
    if places is None:
        return _locate(file, entries, end)
    window = _Direct(file)
    checks: dict[int, UseCheck] = {}
    for before, place in pairwise([None, *places]):
        assert place is not None
        check = partial(_check_place, window, before, place, end)
        nbytes = place.offset - place.entry.header
        if _STORAGE.search(place.entry.name) and not file.holds(place.entry.header, nbytes):
            checks[place.offset] = UseCheck(0 if before is None else before.stop, place.stop, check)
        else:
            check()
    _check_descriptor(window, places[-1], end)
    file.check_before_use(checks)
    records = [
        Record(entry.name, entry.method, entry.crc32, entry.stored_bytes, entry.nbytes, offset)
        for entry, offset, _, _ in places
    ]
    return records, list(_unread_headers(len(checks), len(records)))


def _aligned_places(entries: list[_Entry], end: _End) -> list[_Place] | None:
    """Count back from each record's successor; None where a payload is not aligned as torch aligns it.

    Source: torch, ``caffe2/serialize/inline_container.cc`` (``getPadding``: a payload begins at a multiple of 64).
    """
    places = []
    starts = [*(entry.header for entry in entries), end.offset]
    for entry, stop in zip(entries, starts[1:], strict=True):
        offset = stop - _torch_descriptor_bytes(entry) - entry.stored_bytes
        padding = offset - entry.header - _LOCAL.size - len(entry.raw_name)
        if offset % _TORCH_ALIGNMENT or not 0 <= padding <= 0xFFFF:
            return None
        places.append(_Place(entry, offset, offset + entry.stored_bytes, stop))
    return places if places and entries[0].header == 0 else None


def _torch_descriptor_bytes(entry: _Entry) -> int:
    if not entry.flags & _HAS_DESCRIPTOR:
        return 0
    is_wide = max(entry.header, entry.stored_bytes, entry.nbytes) >= _IN_ZIP64
    return _DESCRIPTOR64.size if is_wide else _DESCRIPTOR.size


def _check_place(window: _Window, before: _Place | None, place: _Place, end: _End) -> None:
    """Compare a local header, and the descriptor right before it, with what the directory says."""
    if before is not None:
        _check_descriptor(window, before, end)
    if _read_local(window, place.entry, end) != place.offset:
        raise _inconsistent(f"the record {place.entry.name!r:.100} does not begin where the next one says")


def _check_descriptor(window: _Window, place: _Place, end: _End) -> None:
    if not place.entry.flags & _HAS_DESCRIPTOR:
        return
    if place.stop + _descriptor_size(window, place.entry, place.stop, end) != place.end:
        raise _inconsistent(f"the record {place.entry.name!r:.100} does not end where the next one begins")


def _unread_headers(unread: int, records: int) -> Iterable[Finding]:
    if unread:
        yield Finding(
            "unread-headers",
            f"{unread} of {records} local headers were not fetched: each is compared before its tensor is read",
        )


# --- an archive as torch writes it --------------------------------------------------------------------------------


def _read_plain_records(file: InputFile, directory: bytes, end: _End) -> list[Record] | None:
    """Read records that are stored back to back, in the order of the directory and without 64-bit fields.

    Anything else gives None: the general way, which takes three times as long, looks closer and knows what to say. All
    that it demands of such records is demanded here, in one loop because there may be 50,000 of them.
    """
    raw_names: list[bytes] = []
    numbers: list[tuple[int, int, int]] = []
    block, base, reach = b"", 0, 0
    at = position = 0
    plain: tuple[int, ...] = ()
    shared_flags = _KNOWN_FLAGS
    beginning = start = descriptor = b""
    for _ in range(end.entries):
        if at + _CENTRAL.size > len(directory):
            return None
        (signature, _, _, flags, method, _, _, crc, stored, nbytes, name_size, extra_size, comment_size, disk, _,
         attributes, header) = _CENTRAL.unpack_from(directory, at)  # fmt: skip
        if signature != _CENTRAL_SIGNATURE or stored != nbytes or _IN_ZIP64 in (stored, header):
            return None
        common = (flags, method, extra_size, comment_size, disk, attributes)
        if common != plain:  # what nearly all have in common is looked at once
            if flags & ~_KNOWN_FLAGS or method or extra_size or comment_size or disk or attributes & _ODD_ATTRIBUTES:
                return None
            plain = common
            shared_flags &= flags
        if directory[at + 6 : at + 16] != beginning:
            beginning = directory[at + 6 : at + 16]
            start = LOCAL_SIGNATURE + beginning
        figures = directory[at + 16 : at + 28]
        name_at = at + _CENTRAL.size
        raw_name = directory[name_at : name_at + name_size]
        # The descriptor of the record before stands in front of this one's header.
        header_at = position + len(descriptor)
        header_end = header_at + _LOCAL.size + name_size
        if header_end > reach:
            block = file.read(position, min(_BLOCK_BYTES + name_size, file.size - position))
            base, reach = position, position + len(block)
        local = start + (_NO_NUMBERS if flags & _HAS_DESCRIPTOR else figures) + directory[at + 28 : at + 30]
        place = header_at - base
        if (
            header != header_at
            or header_end > reach
            or not block.startswith(descriptor + local, position - base)
            or not block.startswith(raw_name, place + _LOCAL.size)
        ):
            return None
        offset = header_end + block[place + 28] + (block[place + 29] << 8)
        position = offset + stored
        descriptor = _DESCRIPTOR_SIGNATURE + figures if flags & _HAS_DESCRIPTOR else b""
        raw_names.append(raw_name)
        numbers.append((crc, nbytes, offset))
        at = name_at + name_size
    if at != len(directory) or position + len(descriptor) != end.offset:
        return None
    if descriptor and file.read(position, len(descriptor)) != descriptor:
        return None
    names = _decode_names(raw_names, shared_flags)
    if names is None:
        return None
    _check_names(names)
    crcs, sizes, offsets = zip(*numbers, strict=True) if numbers else ((), (), ())
    return make_rows(Record, names, [STORED] * len(names), crcs, sizes, sizes, offsets)


def _decode_names(raw_names: list[bytes], flags: int) -> list[str] | None:
    """Decode all names at once; None where a code page would have to be asked, or a name has a NUL or is no UTF-8."""
    listing = b"\0".join(raw_names)
    if (not listing.isascii() and not flags & _IS_UTF8) or listing.count(b"\0") >= max(len(raw_names), 1):
        return None
    try:
        return listing.decode().split("\0") if raw_names else []
    except UnicodeDecodeError:
        return None
