"""Write a torch file: a zip of stored, aligned records, laid out as ``torch.save`` does.

Source: ``caffe2/serialize/inline_container.cc`` (``PyTorchStreamWriter``) and its ``miniz``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

from ckptool.model.checksums import crc32
from ckptool.model.copies import CopyPlan, Payload
from ckptool.model.sources import Progress
from ckptool.writers.pickle import pickle_tree
from ckptool.writers.stream import copy_payload

_ROOT = "archive"
_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF  # what no longer fits its 32-bit field says so with this value
_MAX_COUNT = 0xFFFF
_FLAGS_EMPTY = 0x0800  # names are UTF-8
_FLAGS = _FLAGS_EMPTY | 0x0008  # the checksum and the sizes follow the bytes
_ZIP64 = 1
_PADDING = int.from_bytes(b"FB", "little")

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR_64 = struct.Struct("<4sI2Q")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """Place one record: where its header begins in the file and how much padding aligns its bytes."""

    name: bytes
    content: bytes | Payload
    nbytes: int
    offset: int
    padding: int

    @property
    def flags(self) -> int:
        return _FLAGS if self.nbytes else _FLAGS_EMPTY

    @property
    def descriptor(self) -> struct.Struct:
        return _DESCRIPTOR_64 if max(self.nbytes, self.offset) >= _LIMIT else _DESCRIPTOR

    @property
    def end(self) -> int:
        head = _LOCAL.size + len(self.name) + len(_local_extra(self))
        return self.offset + head + self.nbytes + (self.descriptor.size if self.nbytes else 0)


def write_torch(plan: CopyPlan, file: BinaryIO, progress: Progress) -> dict[Payload, int]:
    """Write the root of a plan; give the CRC32 of each payload.

    :raises OutputRefused: the root holds something else than plain data and planned tensors.
    """
    records = _lay_out(plan)
    checksums = [_write_record(record, file, progress) for record in records]
    _write_directory(records, checksums, file)
    file.flush()
    return {
        record.content: checksum
        for record, checksum in zip(records, checksums, strict=True)
        if isinstance(record.content, Payload)
    }


def count_torch_bytes(plan: CopyPlan) -> int:
    """Give the size of the file in bytes; raises as ``write_torch`` does."""
    records = _lay_out(plan)
    directory = sum(len(_central_header(record, 0)) for record in records)
    return records[-1].end + directory + _END_64.size + _LOCATOR.size + _END.size


@lru_cache(maxsize=1)  # a plan is asked for its size first and then written
def _lay_out(plan: CopyPlan) -> tuple[_Record, ...]:
    pickled = pickle_tree(plan.root)
    contents: list[tuple[str, bytes | Payload]] = [
        ("data.pkl", pickled.data),
        ("byteorder", b"little"),
        *((f"data/{index}", payload) for index, payload in enumerate(pickled.payloads)),
        ("version", b"3\n"),
    ]
    records: list[_Record] = []
    offset = 0
    for name, content in contents:
        records.append(_place(f"{_ROOT}/{name}".encode(), content, offset))
        offset = records[-1].end
    return tuple(records)


def _place(name: bytes, content: bytes | Payload, offset: int) -> _Record:
    nbytes = content.nbytes if isinstance(content, Payload) else len(content)
    unpadded = _Record(name, content, nbytes, offset, padding=0)
    start = offset + _LOCAL.size + len(name) + len(_local_extra(unpadded))
    return _Record(name, content, nbytes, offset, padding=-start % _ALIGNMENT)


def _write_record(record: _Record, file: BinaryIO, progress: Progress) -> int:
    extra = _local_extra(record)
    file.write(_LOCAL.pack(b"PK\3\4", 0, record.flags, 0, 0, 0, 0, 0, 0, len(record.name), len(extra)))
    file.write(record.name + extra)
    if isinstance(record.content, Payload):
        checksum = copy_payload(record.content, file, progress)
    else:
        file.write(record.content)
        checksum = crc32(record.content)
    if record.nbytes:
        file.write(record.descriptor.pack(b"PK\7\x08", checksum, record.nbytes, record.nbytes))
    return checksum


def _local_extra(record: _Record) -> bytes:
    # torch writes 0 for the stored size here, which it does not know yet, and the offset, which belongs elsewhere.
    padding = struct.pack("<2H", _PADDING, record.padding) + b"Z" * record.padding
    return _large_fields(record, stored_bytes=0) + padding


def _large_fields(record: _Record, stored_bytes: int) -> bytes:
    """Give the zip64 field: the sizes and the offset that do not fit 32 bits; empty where all do."""
    sizes = [record.nbytes, stored_bytes] if record.nbytes >= _LIMIT else []
    large = [*sizes, record.offset] if record.offset >= _LIMIT else sizes
    return struct.pack(f"<2H{len(large)}Q", _ZIP64, 8 * len(large), *large) if large else b""


def _central_header(record: _Record, checksum: int) -> bytes:
    extra = _large_fields(record, stored_bytes=record.nbytes)
    nbytes, offset = min(record.nbytes, _LIMIT), min(record.offset, _LIMIT)
    # Versions, dates and attributes are 0, as torch leaves them: the same input gives the same bytes.
    sizes = (checksum, nbytes, nbytes, len(record.name), len(extra))
    return _CENTRAL.pack(b"PK\1\2", 0, 0, record.flags, 0, 0, 0, *sizes, 0, 0, 0, 0, offset) + record.name + extra


def _write_directory(records: Sequence[_Record], checksums: Sequence[int], file: BinaryIO) -> None:
    begin, nbytes, count = records[-1].end, 0, len(records)
    for record, checksum in zip(records, checksums, strict=True):
        nbytes += file.write(_central_header(record, checksum))
    # Always with the 64-bit end, as torch: 44 bytes follow its length, miniz calls itself 0x031E and asks for 45.
    file.write(_END_64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, nbytes, begin))
    file.write(_LOCATOR.pack(b"PK\6\7", 0, begin + nbytes, 1))
    short = min(count, _MAX_COUNT)
    file.write(_END.pack(b"PK\5\6", 0, 0, short, short, min(nbytes, _LIMIT), min(begin, _LIMIT), 0))
