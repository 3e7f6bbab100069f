"""How a zip archive is laid out, and what is known of one once it is read.

Layout: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.sources import DeflatedRecord, StoredRange
from ckptool.model.checkpoint import Finding

STORED, DEFLATED = 0, 8

CENTRAL = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
DESCRIPTOR = struct.Struct("<4s3I")
DESCRIPTOR64 = struct.Struct("<4sI2Q")

LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL_SIGNATURE = b"PK\x01\x02"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"

IN_ZIP64 = 0xFFFFFFFF
BLOCK_BYTES = 4096
NO_NUMBERS = bytes(12)

ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
HAS_DESCRIPTOR = 1 << 3
IS_UTF8 = 1 << 11
# Bits 1 and 2 only say how hard the compressor tried.
KNOWN_FLAGS = 1 << 1 | 1 << 2 | HAS_DESCRIPTOR | IS_UTF8
# Set for a folder; torch then reads nothing for the record and hands out uninitialised memory.
IS_FOLDER = 0x10

REZIP = "write the checkpoint anew with torch.save"


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


class End(NamedTuple):
    """Say where the central directory lies, in bytes, how many entries it has, and where the file's tail begins."""

    entries: int
    size: int
    offset: int
    tail: int


def inconsistent(what: str) -> UnreadableCheckpoint:
    """Refuse an archive that contradicts itself."""
    return UnreadableCheckpoint(f"the zip archive is damaged or was tampered with: {what}; {AGAIN}")
