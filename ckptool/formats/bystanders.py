"""Files that lie beside checkpoints and are none: told by what they begin with."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile, open_file
from ckptool.formats.sniff import is_plain_text
from ckptool.formats.zip import LOCAL_SIGNATURE, read_archive

_HEAD_BYTES = 4096

# Where it stands, the first bytes, the kind; what could hold a checkpoint (archives, compressed files) is not listed.
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF8", "image"),
    (8, b"WEBP", "image"),
    (0, b"II*\0", "image"),
    (0, b"%PDF-", "document"),
    (0, b"SQLite format 3\0", "database"),
    (0, b"\x7fELF", "program"),
    (0, b"version https://git-lfs.github.com/spec/", "Git LFS pointer"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 file"),
    (0, b"GGUF", "GGUF model"),
    (8, b"WAVE", "sound"),
    (4, b"ftyp", "video"),
    # A record of TensorBoard: length, checksum of the length, then an Event whose file_version (field 3) this is.
    # Source: tensorflow/core/util/events_writer.cc, kVersionPrefix.
    (23, b"brain.Event:", "TensorBoard log"),
)
# Logs paint and overwrite their lines.
_TERMINAL_CONTROLS = b"\x1b\b\f"
# A record of an archive that may be a checkpoint, or hold one.
_RECORD = re.compile(r"\.(?:pkl|npy|h5|pt|pth|ckpt|bin|tar|safetensors)$|(?:^|/)(?:version|archive_format)$")
_KINDS = (
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def name_bystander(path: Path) -> str | None:
    """Name the kind of a file that is recognisably no checkpoint; None for whatever may be one, or was one.

    :raises UnreadableCheckpoint: it cannot be opened or read.
    :raises OSError: it cannot be looked at.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return next((kind for test, kind in _KINDS if test(mode)), "no regular file")
    file = open_file(path)
    try:
        head = file.read(0, min(file.size, _HEAD_BYTES))
        return _kind_of_archive(file) if head.startswith(LOCAL_SIGNATURE) else _kind(head)
    finally:
        file.close()


def _kind(head: bytes) -> str | None:
    if not head:
        return "empty file"
    by_signature = next((kind for offset, sign, kind in _SIGNATURES if head.startswith(sign, offset)), None)
    return by_signature or ("text" if is_plain_text(head.translate(None, _TERMINAL_CONTROLS)) else None)


def _kind_of_archive(file: InputFile) -> str | None:
    """Tell an archive of other things (a document, a wheel) from a checkpoint; a broken one may be either."""
    try:
        names = read_archive(file).records
    except UnreadableCheckpoint:
        return None
    return None if any(map(_RECORD.search, names)) else "zip archive"
