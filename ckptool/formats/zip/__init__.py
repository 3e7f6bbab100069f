"""A zip archive, read so that no two readers could disagree on what it holds.

Everything the central directory says is compared with the local headers and descriptors; what is stated twice must be
stated alike.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.zip.end import find_end, has_directory
from ckptool.formats.zip.layout import DEFLATED, LOCAL_SIGNATURE, STORED, Archive, End, Record
from ckptool.formats.zip.names import check_names
from ckptool.formats.zip.plain import read_plain_records
from ckptool.model.checkpoint import Finding

__all__ = ["DEFLATED", "LOCAL_SIGNATURE", "STORED", "Archive", "Record", "has_directory", "read_archive"]


def read_archive(file: InputFile) -> Archive:
    """Read the directory of a zip archive and check it against the whole file; no payload is read.

    :raises UnreadableCheckpoint: it is damaged, or two readers could disagree on it.
    """
    end = find_end(file)
    directory = file.read(end.offset, end.size)
    plain = None if file.is_remote else read_plain_records(file, directory, end)
    records, findings = (plain, []) if plain is not None else _read_records(file, directory, end)
    return Archive({record.name: record for record in records}, tuple(findings))


def _read_records(file: InputFile, directory: bytes, end: End) -> tuple[list[Record], list[Finding]]:
    """Read any archive: what is odd about one is refused with a sentence or becomes a finding."""
    from ckptool.formats.zip.directory import read_entries  # what no archive of torch's own needs

    entries = read_entries(directory, end)
    check_names([entry.name for entry in entries])
    if file.is_remote:
        from ckptool.formats.zip.remote import locate_remote as locate
    else:
        from ckptool.formats.zip.headers import locate
    records, findings = locate(file, entries, end)
    _check_expansion(records, file.size)
    findings += [
        Finding("symlink-record", f"the record {entry.name!r:.100} is marked as a symbolic link")
        for entry in entries
        if entry.is_link
    ]
    return records, findings


def _check_expansion(records: Iterable[Record], file_bytes: int) -> None:
    limit = max(4 * file_bytes, 1 << 30)
    total = sum(record.nbytes for record in records if record.method == DEFLATED)
    if total > limit:
        raise UnreadableCheckpoint(
            f"the zip archive would expand from {file_bytes:,} to {total:,} bytes; unpack and zip it uncompressed first"
        )
