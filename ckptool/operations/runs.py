"""Read payloads in runs of whole elements: one alone, or two side by side."""

from __future__ import annotations

from collections.abc import Iterator

from ckptool.model.copies import Payload
from ckptool.model.sources import CHUNK_BYTES, NoProgress, Progress

RUN_ELEMENTS = 1 << 16  # what is computed together stays in the L2 cache

Run = memoryview
_PROBE_BYTES = 256  # where all values changed, the first few tell
_NOTHING = memoryview(b"")


def element_runs(payload: Payload, most: int = RUN_ELEMENTS) -> Iterator[Run]:
    """Yield the bytes of at most ``most`` whole elements at a time; a run is valid until the next one is asked for.

    :raises UnreadableCheckpoint: the bytes cannot be read, or do not match their checksum.
    """
    size = payload.dtype.itemsize
    for extent in payload.extents:
        rest = b""
        for chunk in extent.source.stream(extent.offset, extent.nbytes):
            data = memoryview(rest + bytes(chunk)) if rest else chunk
            end = len(data) // size * size
            for start in range(0, end, most * size):
                yield data[start : min(start + most * size, end)]
            rest = bytes(data[end:])


def paired_runs(one: Payload, other: Payload, most: int = RUN_ELEMENTS) -> Iterator[tuple[Run, Run]]:
    """Yield the bytes of the same elements of two payloads of equal length, whatever chunks their sources give.

    :raises UnreadableCheckpoint: the bytes cannot be read, or do not match their checksum.
    """
    size, other_size = one.dtype.itemsize, other.dtype.itemsize
    runs, other_runs = element_runs(one, most), element_runs(other, most)
    left, right = _NOTHING, _NOTHING
    while True:
        left, right = left or next(runs, _NOTHING), right or next(other_runs, _NOTHING)
        count = min(len(left) // size, len(right) // other_size)
        if not count:
            return
        yield left[: count * size], right[: count * other_size]
        left, right = left[count * size :], right[count * other_size :]


def are_equal(one: Run, other: Run) -> bool:
    """Compare bytes at the speed of memory: Python compares two memoryviews item by item, but this by ``memcmp``."""
    return bytearray(one[:_PROBE_BYTES]) == other[:_PROBE_BYTES] and _as_bytearray(one) == other


def _as_bytearray(run: Run) -> bytearray:
    """Give the buffer itself where the run fills it, and a copy otherwise."""
    buffer = run.obj
    return buffer if isinstance(buffer, bytearray) and len(buffer) == len(run) else bytearray(run)


def same_bytes(one: Payload, other: Payload, progress: Progress | None = None) -> bool:
    """Tell whether two payloads of equal length hold the same bytes; reads no further than to the first difference.

    :raises UnreadableCheckpoint: the bytes cannot be read, or do not match their checksum.
    """
    told, seen = progress or NoProgress(), 0
    for left, right in paired_runs(one, other, CHUNK_BYTES):
        if not are_equal(left, right):
            told.advance(-seen)  # who wants to know more reads again
            return False
        seen += len(left)
        told.advance(len(left))
    return True
