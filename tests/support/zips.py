"""Write zip archives field by field, so that each may lie."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

_LOCAL = ("signature", "needed", "flags", "method", "time", "date", "crc", "stored", "size", "name_size", "extra_size")
_CENTRAL = (
    *("signature", "made_by", "needed", "flags", "method", "time", "date", "crc", "stored", "size"),
    *("name_size", "extra_size", "comment_size", "disk", "internal", "attributes", "header"),
)
_END = ("signature", "disk", "start_disk", "here", "total", "size", "offset", "comment_size")
_END64 = (
    *("signature", "record_size", "made_by", "needed", "disk", "start_disk"),
    *("here", "total", "size", "offset"),
)
_LOCATOR = ("signature", "disk", "offset", "disks")

Fields = dict[str, int]


@dataclass
class Entry:
    """Describe one record: ``data`` is what is stored; ``local`` and ``central`` override header fields."""

    name: str | bytes
    data: bytes = b""
    local: Fields = field(default_factory=dict)
    central: Fields = field(default_factory=dict)
    both: Fields = field(default_factory=dict)
    local_name: str | bytes | None = None
    local_extra: bytes = b""
    central_extra: bytes = b""
    descriptor: bytes = b""
    before: bytes = b""


def deflated(name: str, data: bytes, **both: int) -> Entry:
    """Describe a record that is compressed."""
    engine = zlib.compressobj(wbits=-15)
    stored = engine.compress(data) + engine.flush()
    return Entry(name, stored, both={"method": 8, "crc": zlib.crc32(data), "size": len(data)} | both)


def entries_of(members: dict[str, bytes]) -> list[Entry]:
    """Describe plain records."""
    return [Entry(name, data) for name, data in members.items()]


def archive(
    entries: list[Entry],
    *,
    before: bytes = b"",
    gap: bytes = b"",
    comment: bytes = b"",
    end: Fields | None = None,
    end64: Fields | None = None,
    locator: Fields | None = None,
) -> bytes:
    """Write the archive; ``end64`` adds the 64-bit end records, and each table overrides fields."""
    data = bytearray(before)
    central = bytearray()
    for entry in entries:
        data += entry.before
        central += _central(entry, len(data))
        data += _local(entry) + entry.data + entry.descriptor
    data += gap
    place = {"here": len(entries), "total": len(entries), "size": len(central), "offset": len(data)}
    data += central
    if end64 is not None:
        at = len(data)
        fields = {"signature": 0x06064B50, "record_size": 44, "made_by": 45, "needed": 45} | place | end64
        data += _pack("<IQ2H2I4Q", _END64, fields)
        data += _pack("<IIQI", _LOCATOR, {"signature": 0x07064B50, "offset": at, "disks": 1} | (locator or {}))
    fields = {"signature": 0x06054B50, "comment_size": len(comment)} | place | (end or {})
    return bytes(data + _pack("<I4H2IH", _END, fields) + comment)


def _local(entry: Entry) -> bytes:
    name = _encode(entry.name if entry.local_name is None else entry.local_name)
    fields = {"signature": 0x04034B50, "name_size": len(name), "extra_size": len(entry.local_extra)}
    return _pack("<I5H3I2H", _LOCAL, _numbers(entry) | fields | entry.local) + name + entry.local_extra


def _central(entry: Entry, header: int) -> bytes:
    name = _encode(entry.name)
    fields = {"signature": 0x02014B50, "name_size": len(name), "extra_size": len(entry.central_extra), "header": header}
    return _pack("<I6H3I5H2I", _CENTRAL, _numbers(entry) | fields | entry.central) + name + entry.central_extra


def _numbers(entry: Entry) -> Fields:
    crc = zlib.crc32(entry.data)
    return {"needed": 20, "crc": crc, "stored": len(entry.data), "size": len(entry.data)} | entry.both


def _encode(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name


def _pack(layout: str, names: tuple[str, ...], fields: Fields) -> bytes:
    return struct.pack(layout, *(fields.get(name, 0) for name in names))
