"""Where a checkpoint lies: a path on this disk, or the address of a file elsewhere."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PosixPath
from typing import Any

_ADDRESS = re.compile(r"(?:https?|s3|gs|hf)://", re.IGNORECASE)
_WITH_QUERY = re.compile(r"(https?://[^?#]*)[?#].*", re.IGNORECASE | re.DOTALL)


class RemotePath(PosixPath):
    """Name a file elsewhere by its address; ``name``, ``suffix`` and ``parent`` are those of the address's path.

    The system knows no file of this name: whatever asks it hears that there is none.
    """

    address: str

    def __new__(cls, address: str) -> RemotePath:
        """Keep the address as it was given: a path would forget its double slashes."""
        place = super().__new__(cls, _without_query(address))
        place.address = address
        return place

    if sys.version_info >= (3, 12):

        def __init__(self, address: str) -> None:
            super().__init__(_without_query(address))

    @property
    def parent(self) -> RemotePath:
        """Give the address of the folder, without a query: that was for the one file."""
        return RemotePath(_without_query(self.address).rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Give the address of another file in the same folder."""
        return self.parent / name

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        return RemotePath(f"{_without_query(self.address).rstrip('/')}/{self._spelled(os.fspath(name))}")

    def _spelled(self, name: str) -> str:
        if not self.address.lower().startswith("http"):
            return name
        from urllib.parse import quote  # paths on this disk do without

        return quote(name)

    def __str__(self) -> str:
        return self.address

    def __fspath__(self) -> str:
        return self.address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.address,)


def as_path(text: str | os.PathLike[str]) -> Path:
    """Read what a user calls a checkpoint: an address, unless something of that very name is on this disk."""
    name = os.fspath(text)
    return RemotePath(name) if _ADDRESS.match(name) and not os.path.lexists(name) else Path(name)


def is_same_file(path: Path, other: Path) -> bool:
    """Tell whether two paths lead to one file that is there."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # one of them is not there, or what hinders a look at it is told where it is written
        return False


def _without_query(address: str) -> str:
    match = _WITH_QUERY.fullmatch(address)
    return address if match is None else match[1]
