"""Files that lie beside checkpoints and are none: told by what they begin with."""

from __future__ import annotations

import re
import stat
import zlib
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile, open_file
from ckptool.formats.sniff import archive_kind, is_onnx, is_plain_text, recognise
from ckptool.formats.zip import LOCAL_SIGNATURE, read_archive

_HEAD_BYTES = 4096

# How files begin that hold no checkpoint; archives and compressed files may, and are not listed.
_BEGINNINGS = (
    ("image", rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\0(?!\0{4})|MM\0\*|BM.{4}\0{4}"),
    ("document", rb"%PDF-"),
    ("database", rb"SQLite format 3\0"),
    ("program", rb"\x7fELF|MZ\x90\0\x03|..\r\n.{12}[\xe3c]"),  # the last one: what Python compiled
    ("sound", rb"RIFF.{4}WAVE|ID3[\x02-\x04]|OggS|fLaC"),
    ("video", rb".{4}ftyp|\x1aE\xdf\xa3"),
    ("HDF5 file", rb"\x89HDF\r\n\x1a\n"),
    ("GGUF model", rb"GGUF"),
    ("Git LFS pointer", rb"version https://git-lfs\.github\.com/spec/"),
    # A record: its length, a checksum, then an Event whose file_version (field 3) this is.
    # Source: tensorflow/core/util/events_writer.cc, kVersionPrefix.
    ("TensorBoard log", rb".{23}brain\.Event:"),
)
_PATTERNS = tuple([(kind, re.compile(pattern, re.DOTALL)) for kind, pattern in _BEGINNINGS])
# Logs paint and overwrite their lines; old ones are in one byte a letter.
_TERMINAL_CONTROLS = b"\x1b\b\f"
_SINGLE_BYTE_TEXT = re.compile(rb"[\t\r\n\x20-\x7e\xa0-\xff]{32,}")
_ENOUGH_BYTES = 32  # of what is compressed: a letter or two are in anything
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
# A checkpoint inside an archive, or another archive.
_INSIDE = re.compile(r"\.(?:pt|pth|ckpt|bin|pkl|safetensors|th|npy|npz|tar|zip|gz|model|nemo)$", re.IGNORECASE)
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
    if head.startswith(_GZIP):
        unpacked = _unpacked(head)
        is_text = len(unpacked) >= _ENOUGH_BYTES and _is_text(unpacked) and not recognise(unpacked)
        return "compressed text" if is_text else None
    if recognise(head):
        return None
    by_beginning = next((kind for kind, pattern in _PATTERNS if pattern.match(head)), None)
    return by_beginning or ("ONNX model" if is_onnx(head) else "text" if _is_text(head) else None)


def _is_text(head: bytes) -> bool:
    if head.startswith(_UTF16_MARKS):
        head = head.decode("utf-16", "ignore").encode()
    head = head.translate(None, _TERMINAL_CONTROLS)
    return is_plain_text(head) or _SINGLE_BYTE_TEXT.fullmatch(head) is not None


def _unpacked(head: bytes) -> bytes:
    """Unpack the beginning of a gzip stream, no more than is looked at."""
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(head, _HEAD_BYTES)
    except zlib.error:
        return b""


def _kind_of_archive(file: InputFile) -> str | None:
    """Tell an archive of other things (a document, a wheel) from a checkpoint; a broken one may be either."""
    try:
        names = read_archive(file).records
        kind = archive_kind(names)
    except UnreadableCheckpoint:
        return None
    return "zip archive" if kind == "zip-around" and not any(map(_INSIDE.search, names)) else None
