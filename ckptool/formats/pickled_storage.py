"""A storage as ``pickle.dump`` writes it: a whole stream of torch before 1.6, as bytes inside the pickle.

Source: torch/storage.py, ``TypedStorage.__reduce__`` and ``_load_from_bytes``.
"""

from __future__ import annotations

from typing import Any

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.pickle import GlobalLog, PickledStorage, read_pickle
from ckptool.formats.sources import MemorySource
from ckptool.formats.torch_legacy import COUNT_BYTES, check_preamble
from ckptool.formats.torch_zip import check_identifier
from ckptool.model.values import Storage

_LABEL = "a storage in the pickle"


def read_pickled_storage(data: bytes, log: GlobalLog) -> PickledStorage:
    """Read the one storage that the stream holds; its bytes stay where they are.

    :raises UnreadableCheckpoint: the stream is damaged, or holds anything else. ``log`` gets what it named all the
        same.
    """
    stream = _Stream(data)
    try:
        return _read(data, stream)
    finally:
        for use in stream.log.uses():
            log.record(use.ref, use.where, use.called)
        for finding in stream.log.findings:
            log.note(finding.code, finding.text)


def _read(data: bytes, stream: _Stream) -> PickledStorage:
    check_preamble(stream)
    stream.read("object")
    keys, named = stream.read("storage keys"), stream.named
    if len(named) != 1 or len(named[0]) != 6 or named[0][5] is not None or keys != [named[0][2]]:
        raise _damaged("does not hold one storage")
    _, kind, key, location, numel, _ = named[0]
    check_identifier(kind, key, location, numel)
    nbytes = numel * (kind.dtype.itemsize if kind.dtype else 1)
    begin = stream.position + COUNT_BYTES
    count = int.from_bytes(data[stream.position : begin], "little", signed=True)
    if count != numel or len(data) != begin + nbytes:
        raise _damaged("has another size than it declares")
    source = MemorySource(_LABEL, memoryview(data)[begin:])
    return PickledStorage(Storage(key, source, nbytes, location), kind.dtype, 0, numel)


class _Stream:
    """Read the pickles of a stream, one after the other; ``named`` are the storages that they refer to."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.log = GlobalLog()
        self.named: list[tuple[Any, ...]] = []
        self.position = 0

    def read(self, label: str) -> Any:
        """Read the next pickle."""
        unpickled = read_pickle(
            self._data, label=f"{_LABEL} ({label})", load_storage=self._note, log=self.log, start=self.position
        )
        self.position = unpickled.end
        return unpickled.value

    def _note(self, identifier: tuple[Any, ...]) -> str:
        self.named.append(identifier)
        return "storage"


def _damaged(what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"{_LABEL} {what}; {AGAIN}")
