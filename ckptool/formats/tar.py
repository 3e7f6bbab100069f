"""A tar archive, read so that no two readers could disagree on what it holds; nothing is ever extracted.

Layout: POSIX.1-2017, "pax Interchange Format" and "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.model.repeats import first_repeated

BLOCK = 512
_MOST_MEMBERS = 100_000
_LARGEST_HEADER = 1 << 20

_CHECKSUM = slice(148, 156)
_MAGICS = (b"ustar\x0000", b"ustar  \0")  # of POSIX and of GNU
_FILES = (b"0", b"\0")
_FOLDER = b"5"
_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL = b"L", b"K", b"x", b"g"
# Links, devices and pipes have no bytes of their own.
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
_NOT_SAID = (0, 0o77777777777)  # what the size field holds where only an extended header can say it
_OCTAL = re.compile(rb"[ \0]*([0-7]+)[ \0]*")
_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")

_REPACK = "unpack it and name the checkpoint in it"


class TarMember(NamedTuple):
    """Place one member: its bytes begin at ``offset``; only a regular file has any."""

    name: str
    is_file: bool
    offset: int
    nbytes: int


@dataclass
class _Overrides:
    """Hold what an extended header says of the member that follows it."""

    name: bytes | None = None
    nbytes: int | None = None
    is_sparse: bool = False


@dataclass
class _Reading:
    """Walk the headers of one archive."""

    file: InputFile
    position: int = 0
    members: list[TarMember] = field(default_factory=list)
    next: _Overrides = field(default_factory=_Overrides)


def read_tar(file: InputFile) -> list[TarMember]:
    """List the members of a tar archive, in the order of the file.

    :raises UnreadableCheckpoint: it is damaged, or two readers could disagree on it.
    """
    reading = _Reading(file)
    while (header := _read_block(reading)).strip(b"\0"):
        _read_member(reading, header)
    _check_end(reading)
    twin = first_repeated(member.name for member in reading.members if member.is_file)
    if twin is not None:
        raise UnreadableCheckpoint(f"the tar archive holds {twin!r:.100} twice, and readers differ; {_REPACK}")
    return reading.members


def _read_block(reading: _Reading) -> bytes:
    if reading.position + BLOCK > reading.file.size:
        raise UnreadableCheckpoint(
            f"this is a truncated tar archive: {reading.file.size:,} bytes are there, its end is not; {AGAIN}"
        )
    block = reading.file.read(reading.position, BLOCK)
    reading.position += BLOCK
    return block


def _read_member(reading: _Reading, header: bytes) -> None:
    kind, name, nbytes = _read_header(header)
    if kind in (_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL):
        data = _read_header_data(reading, nbytes)
        _override(reading.next, kind, data)
        return
    said, reading.next = reading.next, _Overrides()
    text = _decode_name(name if said.name is None else said.name)
    if said.nbytes is not None:
        if nbytes not in (said.nbytes, *_NOT_SAID):
            raise _damaged(f"it gives two sizes of its member {text!r:.100}")
        nbytes = said.nbytes
    if kind in _EMPTY and nbytes:
        raise _damaged(f"its member {text!r:.100} is no file and has {nbytes:,} bytes")
    if len(reading.members) >= _MOST_MEMBERS:
        raise UnreadableCheckpoint(f"the tar archive has more than {_MOST_MEMBERS:,} members; {_REPACK}")
    is_file = kind in _FILES and not said.is_sparse and not text.endswith("/")
    reading.members.append(TarMember(text, is_file, reading.position, nbytes))
    _skip(reading, nbytes, text)


def _read_header(header: bytes) -> tuple[bytes, bytes, int]:
    """Give the kind, the name and the size in bytes of one header, whose checksum must be right."""
    magic = header[257:265]
    if magic not in _MAGICS:
        raise _damaged("a header of it is none")
    summed = sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")
    if _read_number(header[_CHECKSUM]) != summed:
        raise _damaged("the checksum of a header is wrong")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if magic == _MAGICS[0] else b""
    return header[156:157], prefix + b"/" + name if prefix else name, _read_number(header[124:136])


def _read_number(digits: bytes) -> int:
    """Read octal digits, or the big-endian number that GNU writes for large ones."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    found = _OCTAL.fullmatch(digits)
    if not found:
        raise _damaged("a number in a header is none")
    return int(found[1], 8)


def _read_header_data(reading: _Reading, nbytes: int) -> bytes:
    if nbytes > _LARGEST_HEADER:
        raise _damaged(f"an extended header has {nbytes:,} bytes")
    at = reading.position
    _skip(reading, nbytes, "an extended header")
    return reading.file.read(at, nbytes)


def _skip(reading: _Reading, nbytes: int, name: str) -> None:
    end = reading.position + -(-nbytes // BLOCK) * BLOCK
    if end > reading.file.size:
        raise UnreadableCheckpoint(
            f"the tar archive is truncated: {name!r:.100} ends at byte {end:,} of {reading.file.size:,}; {AGAIN}"
        )
    reading.position = end


def _override(said: _Overrides, kind: bytes, data: bytes) -> None:
    if kind == _LONG_NAME:
        said.name = data.partition(b"\0")[0]
    elif kind in (_EXTENDED, _GLOBAL):
        records = _read_records(data)
        if kind == _GLOBAL and not records.keys().isdisjoint((b"path", b"size")):
            raise _damaged("it gives one name or size to all its members")
        said.name = records.get(b"path", said.name)
        said.nbytes = _read_size(records[b"size"]) if b"size" in records else said.nbytes
        said.is_sparse |= any(keyword.startswith(b"GNU.sparse.") for keyword in records)


def _read_records(data: bytes) -> dict[bytes, bytes]:
    """Read the records of an extended header: length in decimal, blank, keyword, equals sign, value, newline."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        found = _RECORD.match(data, at)
        end = at + int(found[1]) if found else 0
        if not found or end > len(data) or end <= found.end() or data[end - 1 : end] != b"\n":
            raise _damaged("an extended header is broken")
        if found[2] in records:
            raise _damaged("an extended header says something twice")
        records[found[2]] = data[found.end() : end - 1]
        at = end
    return records


def _read_size(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _damaged("an extended header gives a size that is none")
    return int(digits)


def _decode_name(name: bytes) -> str:
    """Decode a name without the leading ``./`` that says nothing."""
    if not name or b"\0" in name:
        raise _damaged("a member of it has no name")
    return name.decode("utf-8", "backslashreplace").removeprefix("./") or "./"


def _check_end(reading: _Reading) -> None:
    """Demand the two blocks of zeros that end an archive, and nothing but zeros behind them."""
    if _read_block(reading).strip(b"\0") or reading.next != _Overrides() or reading.file.size % BLOCK:
        raise _damaged("its end is not where it should be")
    for chunk in reading.file.stream(reading.position, reading.file.size - reading.position):
        if bytes(chunk).strip(b"\0"):
            raise UnreadableCheckpoint(f"more bytes follow the end of the tar archive, and readers differ; {_REPACK}")


def _damaged(what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the tar archive is damaged or was tampered with: {what}; {AGAIN}")
