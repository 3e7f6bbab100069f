"""A compressed file (gzip, bzip2, xz), inflated once into a temporary file without a name."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.model.sources import CHUNK_BYTES

# What a small file may become, however well it shrank; the dictionary of an xz stream may need more than any preset.
_FREE_BYTES = 64 << 20
_MOST_INFLATION = 200
_ALWAYS_BYTES = 1 << 30
_XZ_MEMORY = 128 << 20


class _Engine(Protocol):
    """Inflate one stream; as bz2 and lzma do it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """Inflate one member of a gzip file; zlib checks its checksum and its length (RFC 1952)."""

    def __init__(self) -> None:
        self._engine = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def unused_data(self) -> bytes:
        return self._engine.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        chunk = self._engine.decompress(self._engine.unconsumed_tail + data, max_length)
        self.needs_input = not self._engine.unconsumed_tail and len(chunk) < max_length
        return chunk


def _bzip2() -> _Engine:
    import bz2

    return bz2.BZ2Decompressor()


def _xz() -> _Engine:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_ENGINES: dict[str, Callable[[], _Engine]] = {"gzip": _Gzip, "bzip2": _bzip2, "xz": _xz}
COMPRESSED = frozenset(_ENGINES)


def inflate_file(file: InputFile, kind: str) -> InputFile:
    """Inflate a whole file of this kind (``gzip``, ``bzip2``, ``xz``); its own checksums are checked.

    The file itself is closed.

    :raises UnreadableCheckpoint: it is damaged, cut short, expands beyond all measure, or there is no room for it.
    """
    limit = min(max(4 * file.size, _ALWAYS_BYTES), max(_MOST_INFLATION * file.size, _FREE_BYTES))
    inner = spool(file.path, _inflate(file, kind, limit))
    file.check_unchanged()
    file.close()
    return inner


def spool(path: Path, chunks: Iterable[bytes | memoryview]) -> InputFile:
    """Write chunks to a temporary file without a name; ``path`` is what messages about it begin with.

    :raises UnreadableCheckpoint: there is no room for them.
    """
    import tempfile

    try:
        with tempfile.TemporaryFile(buffering=0) as copy:
            for chunk in chunks:
                _write_all(copy.fileno(), chunk)
            return InputFile(path, os.dup(copy.fileno()))
    except OSError as error:
        raise UnreadableCheckpoint(
            f"it cannot be unpacked to {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder with room"
        ) from error


def _write_all(fd: int, chunk: bytes | memoryview) -> None:
    left = memoryview(chunk)
    while left:
        left = left[os.write(fd, left) :]


def _inflate(file: InputFile, kind: str, limit: int) -> Iterator[bytes]:
    """Yield what the streams of a file give, one after the other; only zeros may follow the last."""
    engine: _Engine | None = _ENGINES[kind]()
    for stored in file.stream(0, file.size):
        data = bytes(stored)
        while engine is not None or (data := data.lstrip(b"\0")):
            engine = engine or _ENGINES[kind]()
            chunk = _decompress(engine, data, kind)
            limit -= len(chunk)
            if limit < 0:
                raise UnreadableCheckpoint(
                    f"this is compressed with {kind} and expands too far from {file.size:,} bytes; unpack it yourself"
                )
            yield chunk
            if engine.eof:
                data, engine = engine.unused_data, None
            elif engine.needs_input:
                break
            else:
                data = b""
    if engine is not None:
        raise UnreadableCheckpoint(f"this is compressed with {kind} and cut short; {AGAIN}")


def _decompress(engine: _Engine, data: bytes, kind: str) -> bytes:
    try:
        return engine.decompress(data, CHUNK_BYTES)
    except _damage(kind) as error:
        raise UnreadableCheckpoint(f"this is compressed with {kind} and damaged; {AGAIN}") from error


def _damage(kind: str) -> tuple[type[Exception], ...]:
    """List what the library of this kind raises on damaged bytes."""
    if kind != "xz":
        return zlib.error, OSError, ValueError
    import lzma

    return (lzma.LZMAError,)
