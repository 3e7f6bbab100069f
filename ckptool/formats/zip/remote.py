"""The local headers of an archive elsewhere: each costs a request, so most wait until their bytes are wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from ckptool.formats.file import InputFile
from ckptool.formats.remote.file import RemoteFile, UseCheck
from ckptool.formats.zip.directory import Entry
from ckptool.formats.zip.headers import Window, descriptor_size, locate, read_local
from ckptool.formats.zip.layout import (
    DESCRIPTOR,
    DESCRIPTOR64,
    HAS_DESCRIPTOR,
    IN_ZIP64,
    LOCAL,
    End,
    Record,
    inconsistent,
)
from ckptool.model.checkpoint import Finding

_TORCH_ALIGNMENT = 64
_STORAGE = re.compile(r"^[^/]+/data/[0-9]+$")


class _Direct(Window):
    """Read no more than is asked for: what is elsewhere is fetched in blocks already."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Give so many bytes of the file, or what there is of them."""
        return self._file.read(offset, min(nbytes, self._file.size - offset))


class _Place(NamedTuple):
    """Say where a record's payload begins and ends, and its descriptor ends, in bytes, if torch has written it."""

    entry: Entry
    offset: int
    stop: int
    end: int


def locate_remote(file: InputFile, entries: list[Entry], end: End) -> tuple[list[Record], list[Finding]]:
    """Find the payloads through the directory where torch's alignment vouches for it: a header costs a request each.

    What is at hand, or is no storage, is compared at once; a storage's header before its bytes are streamed.
    """
    assert isinstance(file, RemoteFile)
    places = _aligned_places(sorted(entries, key=attrgetter("header")), end)
    if places is None:
        return locate(file, entries, end)
    window = _Direct(file)
    checks: dict[int, UseCheck] = {}
    for before, place in pairwise([None, *places]):
        assert place is not None
        check = partial(_check_place, window, before, place, end)
        nbytes = place.offset - place.entry.header
        if _STORAGE.search(place.entry.name) and not file.holds(place.entry.header, nbytes):
            checks[place.offset] = UseCheck(0 if before is None else before.stop, place.stop, check)
        else:
            check()
    _check_descriptor(window, places[-1], end)
    file.check_before_use(checks)
    records = [
        Record(entry.name, entry.method, entry.crc32, entry.stored_bytes, entry.nbytes, offset)
        for entry, offset, _, _ in places
    ]
    return records, list(_unread_headers(len(checks), len(records)))


def _aligned_places(entries: list[Entry], end: End) -> list[_Place] | None:
    """Count back from each record's successor; None where a payload is not aligned as torch aligns it.

    Source: torch, ``caffe2/serialize/inline_container.cc`` (``getPadding``: a payload begins at a multiple of 64).
    """
    places = []
    starts = [*(entry.header for entry in entries), end.offset]
    for entry, stop in zip(entries, starts[1:], strict=True):
        offset = stop - _torch_descriptor_bytes(entry) - entry.stored_bytes
        padding = offset - entry.header - LOCAL.size - len(entry.raw_name)
        if offset % _TORCH_ALIGNMENT or not 0 <= padding <= 0xFFFF:
            return None
        places.append(_Place(entry, offset, offset + entry.stored_bytes, stop))
    return places if places and entries[0].header == 0 else None


def _torch_descriptor_bytes(entry: Entry) -> int:
    if not entry.flags & HAS_DESCRIPTOR:
        return 0
    is_wide = max(entry.header, entry.stored_bytes, entry.nbytes) >= IN_ZIP64
    return DESCRIPTOR64.size if is_wide else DESCRIPTOR.size


def _check_place(window: Window, before: _Place | None, place: _Place, end: End) -> None:
    """Compare a local header, and the descriptor right before it, with what the directory says."""
    if before is not None:
        _check_descriptor(window, before, end)
    if read_local(window, place.entry, end) != place.offset:
        raise inconsistent(f"the record {place.entry.name!r:.100} does not begin where the next one says")


def _check_descriptor(window: Window, place: _Place, end: End) -> None:
    if not place.entry.flags & HAS_DESCRIPTOR:
        return
    if place.stop + descriptor_size(window, place.entry, place.stop, end) != place.end:
        raise inconsistent(f"the record {place.entry.name!r:.100} does not end where the next one begins")


def _unread_headers(unread: int, records: int) -> Iterable[Finding]:
    if unread:
        yield Finding(
            "unread-headers",
            f"{unread} of {records} local headers were not fetched: each is compared before its tensor is read",
        )
