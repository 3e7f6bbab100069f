"""What the pickles of a file name that was refused before any of them was read: a broken archive hides nothing.

Nothing here makes a file readable: loaders that are less strict, or tools that repair archives, would read these bytes.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.pickle import GlobalLog, PickledStorage, read_pickle
from ckptool.formats.sniff import HEAD_BYTES, recognise
from ckptool.formats.sources import MemorySource
from ckptool.formats.torch_zip import check_identifier
from ckptool.formats.zip import LOCAL_SIGNATURE
from ckptool.model.values import GlobalUse, Storage

_SEARCHED_BYTES = 64 << 20  # writers put the pickle first
_PICKLE_BYTES = 16 << 20
_MOST_PICKLES = 16
_PARTS = 5  # of a persistent id: "storage", type, key, location, elements
_LOCAL = re.compile(
    re.escape(LOCAL_SIGNATURE) + rb".{22}(..)(..)", re.DOTALL
)  # ends with the lengths of name and extra
_NAME = re.compile(rb"\.(?:pkl|pickle)\Z")


def named_in_ruins(file: InputFile) -> tuple[GlobalUse, ...]:
    """Give what the pickles in a damaged or ambiguous zip archive name, found by their own headers.

    :raises UnreadableCheckpoint: the file cannot be read at all.
    """
    log = GlobalLog()
    data = file.read(0, min(file.size, _SEARCHED_BYTES))
    for name, start in islice(_records(data), _MOST_PICKLES):
        stored = data[start : start + _PICKLE_BYTES]
        for pickle in (stored, *_inflated(stored)):  # whatever the headers say of it: they may lie
            with suppress(UnreadableCheckpoint):
                read_pickle(pickle, label=name, load_storage=_imagine, log=log)
    return log.uses()


def _records(data: bytes) -> Iterator[tuple[str, int]]:
    """Find the records that are named as pickles are, with the places where their payloads begin.

    A file may begin as a pickle, too, and end as an archive.
    """
    if recognise(data[:HEAD_BYTES]) == ["pickle"]:
        yield "the pickle", 0
    for match in _LOCAL.finditer(data):
        name_bytes, extra_bytes = (struct.unpack("<H", length)[0] for length in match.groups())
        name = data[match.end() : match.end() + name_bytes]
        if _NAME.search(name):
            label = name.decode("utf-8", "replace").rpartition("/")[2]
            yield label, match.end() + name_bytes + extra_bytes


def _inflated(stored: bytes) -> Iterator[bytes]:
    """Inflate a record as far as that goes: all of it need not be there."""
    with suppress(zlib.error):
        yield zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, _PICKLE_BYTES)


def _imagine(identifier: tuple[Any, ...]) -> PickledStorage:
    """Take a storage for what the pickle says that it is: its record need not be there."""
    if len(identifier) != _PARTS:
        raise UnreadableCheckpoint(f"a storage is named with {len(identifier)} parts, not {_PARTS}")
    _, kind, key, location, numel = identifier
    check_identifier(kind, key, location, numel)
    nbytes = numel * (kind.dtype.itemsize if kind.dtype else 1)
    return PickledStorage(Storage(key, MemorySource(key, b""), nbytes, location), kind.dtype, 0, numel)
