"""Files elsewhere: read by ranges, as few and as large as the reader's steps allow."""

from __future__ import annotations

from collections.abc import Callable

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.remote.file import RemoteFile
from ckptool.formats.remote.ranges import Ranges
from ckptool.model.places import RemotePath

__all__ = ["open_remote"]


def open_remote(path: RemotePath) -> RemoteFile:
    """Open the file at an address; its first bytes are fetched.

    :raises UnreadableCheckpoint: there is none, it may not be read, or not by ranges.
    """
    address = path.address
    if not address.isprintable():
        raise UnreadableCheckpoint("the address holds control characters; check it")
    ranges = _OPENERS[address.partition(":")[0].lower()](address)
    try:
        if address.endswith("/"):
            raise UnreadableCheckpoint("the address is that of a folder; name a file in it")
        return RemoteFile(path, ranges)
    except BaseException:
        ranges.close()
        raise


# Each kind of address is spared the imports of the others.


def _open_http(address: str) -> Ranges:
    from ckptool.formats.remote.http import HttpRanges

    return HttpRanges(address)


def _open_hub(address: str) -> Ranges:
    from ckptool.formats.remote.hub import HubRanges

    return HubRanges(address)


def _open_bucket(address: str) -> Ranges:
    from ckptool.formats.remote.buckets import BucketRanges

    return BucketRanges(address)


_OPENERS: dict[str, Callable[[str], Ranges]] = {
    "http": _open_http,
    "https": _open_http,
    "hf": _open_hub,
    "s3": _open_bucket,
    "gs": _open_bucket,
}
