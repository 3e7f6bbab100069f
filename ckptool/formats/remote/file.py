"""A file elsewhere that reads like one on this disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from threading import RLock
from typing import NamedTuple

from ckptool.errors import SourceUnavailable, UnreadableCheckpoint
from ckptool.formats.file import InputFile, cut_short
from ckptool.formats.remote.ranges import Ranges, changed
from ckptool.model.places import RemotePath
from ckptool.model.sources import CHUNK_BYTES

# What is fetched first holds the description of nearly every checkpoint: the header of safetensors, data.pkl of torch.
_FIRST_BYTES = 128 << 10
# The end of the file, too: the directory of a zip archive, whose comment may be half of it.
_LAST_BYTES = 128 << 10
# Where a reader jumps to, it may want eight bytes, and jump again.
_LEAST_BYTES = 1 << 10
_MOST_BYTES = 8 << 20
_KEPT_BYTES = 3 * _MOST_BYTES


class UseCheck(NamedTuple):
    """Hold what is to be made sure of before bytes up to ``stop`` are used; it looks at those from ``start`` on."""

    start: int
    stop: int
    run: Callable[[], None]


class RemoteFile(InputFile):
    """Read ranges of a file elsewhere.

    What is fetched is kept for a while, and more is fetched at a time the longer a reader goes on where it was: a
    description costs few small ranges, a whole file few large ones.
    """

    is_remote = True

    def __init__(self, path: RemotePath, ranges: Ranges) -> None:
        self.path = path
        self.fd = -1
        self._spare_buffers = []
        self._ranges = ranges
        self._lock = RLock()
        self._blocks: dict[int, bytes] = {}  # by the offset of their first byte; the latest is the last
        self._checks: dict[int, UseCheck] = {}
        self._starts: list[int] = []
        first = ranges.fetch(0, _FIRST_BYTES)
        self.size, self._version = first.size, first.version
        self._keep(0, first.data)

    def close(self) -> None:
        """Let the connection go; a second call does nothing."""
        self._blocks.clear()
        self._ranges.close()

    def read_some(self, offset: int, nbytes: int) -> bytes:
        """Give up to ``nbytes`` bytes from ``offset`` on, at least one.

        :raises UnreadableCheckpoint: the file ends at ``offset``.
        :raises SourceUnavailable: it cannot be read any more, or changed.
        """
        return bytes(self._look(offset, nbytes)[:nbytes])

    def stream(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield ``nbytes`` bytes from ``offset`` on in chunks; as many as go together are fetched at once.

        :raises UnreadableCheckpoint: the file ends early.
        :raises SourceUnavailable: it cannot be read any more, or changed.
        """
        while nbytes > 0:
            chunk = self._checked(offset, nbytes)[: min(nbytes, CHUNK_BYTES)]
            offset += len(chunk)
            nbytes -= len(chunk)
            yield chunk

    def place(self, offset: int, nbytes: int) -> None:
        """Say that no file on this disk holds the bytes."""

    def check_unchanged(self) -> None:
        """Do nothing: every piece was held against the version of the first one when it came."""

    def holds(self, offset: int, nbytes: int) -> bool:
        """Tell whether these bytes are at hand."""
        return self._find(offset, nbytes) is not None

    def check_before_use(self, checks: Mapping[int, UseCheck]) -> None:
        """Have each check made before bytes from its offset on are streamed."""
        self._checks = dict(checks)
        self._starts = sorted(checks)

    def _read_into(self, target: memoryview, offset: int) -> memoryview:
        found = self._checked(offset, len(target))[: len(target)]
        target[: len(found)] = found
        return target[: len(found)]

    def _checked(self, offset: int, nbytes: int) -> memoryview:
        at = bisect_right(self._starts, offset)
        check = self._checks.get(self._starts[at - 1]) if at else None
        if check is not None and offset < check.stop:
            self._look(check.start, offset + nbytes - check.start)  # both at once
            check.run()
            self._checks.pop(self._starts[at - 1], None)
        return self._look(offset, nbytes)

    def _look(self, offset: int, nbytes: int) -> memoryview:
        """Give what there is from ``offset`` on in one block, at least one byte."""
        if offset >= self.size:
            raise cut_short(offset)
        with self._lock:
            start = self._find(offset, 1)
            if start is None:
                start = self._fetch(offset, nbytes)
            return memoryview(self._blocks[start])[offset - start :]

    def _find(self, offset: int, nbytes: int) -> int | None:
        for start, data in reversed(self._blocks.items()):
            if start <= offset and offset + nbytes <= start + len(data):
                return start
        return None

    def _fetch(self, offset: int, nbytes: int) -> int:
        """Fetch the bytes, and some behind them; at the end of the file, some before them."""
        start, stop = self._extent(offset, nbytes)
        try:
            piece = self._ranges.fetch(start, stop)
            if (piece.size, piece.version) != (self.size, self._version) or len(piece.data) != stop - start:
                raise changed()
        except UnreadableCheckpoint as error:  # it says nothing against the file
            raise SourceUnavailable(f"{self.path}: {error}") from error
        self._keep(start, piece.data)
        return start

    def _extent(self, offset: int, nbytes: int) -> tuple[int, int]:
        before = next((len(data) for start, data in self._blocks.items() if start + len(data) == offset), None)
        if before is None and offset + nbytes == self.size and nbytes < _LAST_BYTES:
            return max(self.size - _LAST_BYTES, 0), self.size
        length = min(max(nbytes, _LEAST_BYTES if before is None else 2 * before), _MOST_BYTES)
        kept = (start for start, data in self._blocks.items() if start > offset and len(data) >= _FIRST_BYTES)
        return offset, min(offset + length, self.size, *kept)

    def _keep(self, start: int, data: bytes) -> None:
        self._blocks.pop(start, None)
        self._blocks[start] = data
        while sum(map(len, self._blocks.values())) > _KEPT_BYTES:
            del self._blocks[next(iter(self._blocks))]
